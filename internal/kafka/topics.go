// The topics: made where they are missing, checked where they are there.
//
// Touches the two topics: it makes them, and lifts their limits on records' times. It alters nothing else
// of a topic that is there.
// Promises that a topic with settings that would lose messages, or with other partitions than a checkpoint
// needs, is a ConfigError, and that both topics can be written to when it is done.

package kafka

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/IBM/sarama"
)

// topic is what one must be like.
type topic struct {
	name       string
	partitions int32
	settings   map[string]string // of one that is made
	asked      []string          // the settings to look at in one that is there
	checked    []string          // those of them that must be as in settings
	retention  string            // what the operator sets its retention by
}

// prepareTopics makes the topics that are missing and checks those that are there.
func (c *Client) prepareTopics() error {
	admin, err := sarama.NewClusterAdminFromClient(c.client)
	if err != nil {
		return err
	}
	for _, t := range c.cfg.topics() {
		if err := c.makeTopic(admin, &t); err != nil {
			return fmt.Errorf("topic %s: %w", t.name, err)
		}
		actual, err := t.readSettings(admin)
		if err != nil {
			return fmt.Errorf("settings of topic %s: %w", t.name, err)
		}
		takeAnyTime(admin, t.name, actual)
		if err := t.check(actual); err != nil {
			return err
		}
	}
	if err := c.awaitLeaders(); err != nil {
		return fmt.Errorf("topics: %w", err)
	}
	return c.countPartitions()
}

// topics declares the two.
func (cfg *Config) topics() []topic {
	retention := "-1"
	if cfg.Retention >= 0 {
		retention = strconv.FormatInt(cfg.Retention.Milliseconds(), 10)
	}
	messages := map[string]string{
		"cleanup.policy":         "delete",
		"retention.ms":           retention,
		"retention.bytes":        "-1",
		"message.timestamp.type": "CreateTime", // a message's time is its sender's, not the broker's
	}
	checkpoints := map[string]string{
		"cleanup.policy": "compact",
		// Only closed segments are compacted, and a busy producer writes hundreds of checkpoints a second.
		"segment.ms":                "600000",
		"segment.bytes":             "4194304",
		"min.cleanable.dirty.ratio": "0.1",
	}
	if cfg.Replication >= 3 {
		messages["min.insync.replicas"], checkpoints["min.insync.replicas"] = "2", "2"
	}
	checked := []string{"cleanup.policy", "retention.ms", "retention.bytes", "message.timestamp.type"}
	return []topic{
		{cfg.Topic, cfg.Partitions, messages, slices.Concat(checked, timeLimits), checked,
			cfg.Settings.Retention},
		{cfg.Checkpoints, 1, checkpoints, []string{"cleanup.policy"}, []string{"cleanup.policy"},
			cfg.Settings.Retention},
	}
}

// makeTopic makes the topic, unless it is there.
func (c *Client) makeTopic(admin sarama.ClusterAdmin, t *topic) error {
	found, err := admin.DescribeTopics([]string{t.name})
	if err != nil || len(found) != 1 || found[0].Err != sarama.ErrUnknownTopicOrPartition {
		return err
	}
	detail := &sarama.TopicDetail{NumPartitions: t.partitions, ReplicationFactor: c.cfg.Replication,
		ConfigEntries: make(map[string]*string)}
	for name, value := range t.settings {
		detail.ConfigEntries[name] = &value
	}
	err = admin.CreateTopic(t.name, detail, false)
	if errors.Is(err, sarama.ErrTopicAlreadyExists) {
		return nil // another replica was faster
	}
	if err == nil {
		slog.Info("topic made", "topic", t.name, "partitions", t.partitions)
	}
	return err
}

func (t *topic) readSettings(admin sarama.ClusterAdmin) ([]sarama.ConfigEntry, error) {
	resource := []*sarama.ConfigResource{{Type: sarama.TopicResource, Name: t.name, ConfigNames: t.asked}}
	var err error
	for range 20 { // brokers hear of a new topic a moment later
		var actual []*sarama.ConfigResourceResult
		actual, err = admin.DescribeConfigs(resource, sarama.DescribeConfigsOptions{})
		if err == nil && len(actual) != 1 {
			err = fmt.Errorf("%d answers for one topic", len(actual))
		} else if err == nil && actual[0].ErrorCode != sarama.ErrNoError {
			err = actual[0].ErrorCode
		}
		if err == nil {
			return actual[0].Configs, nil
		}
		if !errors.Is(err, sarama.ErrUnknownTopicOrPartition) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil, err
}

// check refuses a topic whose settings would lose messages.
func (t *topic) check(actual []sarama.ConfigEntry) error {
	for _, entry := range actual {
		want := t.settings[entry.Name]
		if !slices.Contains(t.checked, entry.Name) || entry.Value == want ||
			entry.Name == "retention.ms" && keepsLonger(entry.Value, want) {
			continue
		}
		return configError("topic %s has %s=%s but needs %s: alter it with kafka-configs, or set "+
			"%s to what it has", t.name, entry.Name, entry.Value, want, t.retention)
	}
	return nil
}

// keepsLonger compares two values of retention.ms; -1 is for ever.
func keepsLonger(actual, want string) bool {
	a, errA := strconv.ParseInt(actual, 10, 64)
	w, errW := strconv.ParseInt(want, 10, 64)
	return errA == nil && errW == nil && (a < 0 || w >= 0 && a >= w)
}

// A message's time is its sender's. A broker refuses one too far from its own, by default an hour ahead
// (Kafka 4), and so one step of a clock would stop all messages, also after it is right again. timeLimits
// are the settings of this, as far as a broker has them: before 3.6 one, and none in the embedded broker of
// the tests.
var timeLimits = []string{"message.timestamp.after.max.ms", "message.timestamp.before.max.ms",
	"message.timestamp.difference.max.ms"}

const anyTime = "9223372036854775807"

// takeAnyTime lifts the limits that a topic has. Where the broker does not let it, each start says so, and
// goes on.
func takeAnyTime(admin sarama.ClusterAdmin, topic string, settings []sarama.ConfigEntry) {
	value := anyTime
	changes := make(map[string]sarama.IncrementalAlterConfigsEntry)
	for _, s := range settings {
		if slices.Contains(timeLimits, s.Name) && s.Value != anyTime {
			changes[s.Name] = sarama.IncrementalAlterConfigsEntry{
				Operation: sarama.IncrementalAlterConfigsOperationSet, Value: &value}
		}
	}
	if len(changes) == 0 {
		return
	}
	if err := admin.IncrementalAlterConfig(sarama.TopicResource, topic, changes, false); err != nil {
		slog.Warn("a step of a clock may stop all events: alter the topic's settings with kafka-configs, "+
			"since this service may not",
			"topic", topic, "settings", slices.Sorted(maps.Keys(changes)), "value", anyTime, "error", err)
		return
	}
	slog.Info("topic takes records of any time", "topic", topic)
}

// awaitLeaders gives new topics a moment to have leaders for all their partitions.
func (c *Client) awaitLeaders() (err error) {
	for range 20 {
		_ = c.client.RefreshMetadata(c.cfg.Topic, c.cfg.Checkpoints)
		var writable []int32
		if writable, err = c.client.WritablePartitions(c.cfg.Topic); err == nil {
			all, _ := c.client.Partitions(c.cfg.Topic)
			_, err = c.client.Leader(c.cfg.Checkpoints, 0)
			if err == nil && len(all) > 0 && len(all) == len(writable) {
				return nil
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

// countPartitions notes how many there are. A checkpoint needs one order, hence one partition.
func (c *Client) countPartitions() error {
	all, err := c.client.Partitions(c.cfg.Topic)
	if err != nil {
		return fmt.Errorf("topic %s: %w", c.cfg.Topic, err)
	}
	c.partitions = int32(len(all))
	if all, err = c.client.Partitions(c.cfg.Checkpoints); err == nil && len(all) != 1 {
		err = configError("topic %s has %d partitions but a checkpoint needs one: set "+
			"%s to another", c.cfg.Checkpoints, len(all), c.cfg.Settings.Checkpoints)
	}
	return err
}
