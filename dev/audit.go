// The audit of the running stack: every entry of its ledger compared with every event of its topic, by the
// service's own program.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// runningStack reads what a stack said of itself.
func runningStack(data string) (stack addresses, err error) {
	file, err := os.ReadFile(filepath.Join(data, addressFile))
	if err == nil {
		err = json.Unmarshal(file, &stack)
	}
	if err != nil {
		err = fmt.Errorf("no stack runs on %s: start one with `go run -C dev .`, or say where with -data",
			data)
	}
	return stack, err
}

// runAudit returns the audit's exit status as an error: 1 is findings.
func runAudit(ctx context.Context, data string) error {
	stack, err := runningStack(data)
	if err != nil {
		return err
	}
	if len(stack.HTTP) == 0 {
		return fmt.Errorf("the stack on %s has no service: start one with `go run -C dev .`", data)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(data, binaryName), "-audit")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = endWait
	cmd.Env = stack.environment()
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	err = cmd.Run()
	if ended := new(exec.ExitError); errors.As(err, &ended) && ended.Exited() {
		return exitStatus(ended.ExitCode()) // it has said why
	}
	return err
}

// exitStatus is the end of a program that has said why.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// environment is ours with the settings that lead a service to the stack. Whatever of a real deployment
// stands in a developer's environment must not meet this stack.
func (a *addresses) environment() []string {
	environment := slices.DeleteFunc(os.Environ(), func(v string) bool {
		return slices.ContainsFunc([]string{"DATABASE_", "MIGRATE_URL", "REPLICATION_URL", "REDIS_URL", "PG",
			"KAFKA_", "API_KEYS", "TLS_", "OPERATE_ADDR"}, func(prefix string) bool {
			return strings.HasPrefix(v, prefix)
		})
	})
	environment = append(environment, "DATABASE_URL="+a.DatabaseURL, "REDIS_URL="+a.RedisURL,
		"KAFKA_BROKERS="+a.KafkaBrokers)
	for name, value := range a.SecureKafka {
		environment = append(environment, name+"="+value)
	}
	return environment
}
