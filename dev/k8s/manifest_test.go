// Package k8s holds the tests of k8s.yaml and of the Dockerfile, which need no cluster, and in lab/ the proof
// on a real one.
//
// Every document is decoded strictly into the API types of Kubernetes 1.25, so that a field that is misspelt,
// of another type or newer is refused; then the rules below hold it against itself and against what the
// service reads. Each rule is shown to fail on a copy with one fault.
package k8s

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net"
	neturl "net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	apps "k8s.io/api/apps/v1"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	policy "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"
)

const root = "../.."

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestManifestIsConsistent(t *testing.T) {
	m, err := parse(read(t, "k8s.yaml"), settings(t))
	if err == nil {
		err = m.check()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Every rule, and the strictness of the decoding, refuses a manifest with the one fault that it is about.
func TestEachFaultIsRefused(t *testing.T) {
	text, known := read(t, "k8s.yaml"), settings(t)
	for _, f := range []struct{ old, new, want string }{
		// Decoding.
		{"  replicas: 2\n", "  replica: 2\n", `unknown field "replica"`},
		{"  replicas: 2\n", "  replicas: two\n", "cannot unmarshal"},
		{"  replicas: 2\n", "  replicas: 2\n  replicas: 3\n", `"replicas" already set`},
		// Since 1.26.
		{"  maxUnavailable: 1\n", "  maxUnavailable: 1\n  unhealthyPodEvictionPolicy: AlwaysAllow\n",
			`unknown field "unhealthyPodEvictionPolicy"`},
		{"          whenUnsatisfiable: ScheduleAnyway\n",
			"          whenUnsatisfiable: ScheduleAnyway\n          matchLabelKeys: [pod-template-hash]\n",
			"alpha"},
		{"apiVersion: policy/v1\n", "apiVersion: policy/v1beta1\n",
			"policy/v1beta1 PodDisruptionBudget is not among"},
		{"storage: 5Gi", "storage: 5Gigs", "quantities must match"},
		// Names and places.
		{"kind: Service\nmetadata:\n  name: redis\n  namespace: wallet",
			"kind: Service\nmetadata:\n  name: redis\n  namespace: default", "Service redis is in namespace"},
		{"name: kafka-config\n  namespace", "name: wallet-config\n  namespace",
			"ConfigMap wallet-config is there twice"},
		{"pod-security.kubernetes.io/enforce: restricted", "pod-security.kubernetes.io/enforce: baseline",
			"restricted"},
		// Selectors and ports.
		{"  selector:\n    matchLabels:\n      app: wallet-server\n  template",
			"  selector:\n    matchLabels:\n      app: wallet\n  template",
			"selector does not match its own pods"},
		{"  selector:\n    app: redis\n", "  selector:\n    app: reddis\n",
			"Service redis selects 0 workloads"},
		{"targetPort: redis", "targetPort: radis", `no container port "radis"`},
		{"containerPort: 8080", "containerPort: 8081", "LISTEN_ADDR"},
		{"      port: 80\n", "      port: 8080\n", "port 80"},
		{"serviceName: kafka\n", "serviceName: kafkas\n", "there is no Service kafkas"},
		{"httpGet: {path: /readyz, port: http}", "httpGet: {path: /readyz, port: web}",
			`readiness probe: no container port "web"`},
		{"httpGet: {path: /readyz, port: http}", "httpGet: {path: /ready, port: http}", "probes /ready"},
		{"                  name: http\n", "                  name: https\n", "Ingress wallet-server"},
		{"nginx.ingress.kubernetes.io/ssl-redirect: \"false\"",
			"nginx.ingress.kubernetes.io/ssl-redirect: \"true\"", "ssl-redirect"},
		{"REDIS_URL: redis://redis:6379/0", "REDIS_URL: redis://cache:6379/0",
			"REDIS_URL: there is no Service cache"},
		{"KAFKA_BROKERS: kafka:9092", "KAFKA_BROKERS: kafka:9093,kafka:9094",
			"KAFKA_BROKERS: Service kafka has no port 9094"},
		{"$(SERVICE_PASSWORD)@postgres:5432", "$(SERVICE_PASSWORD)@postgres:5433",
			"DATABASE_URL: Service postgres has no port 5433"},
		{"prometheus.io/port: \"8081\"", "prometheus.io/port: \"8080\"", "prometheus.io/port"},
		{"containerPort: 8081", "containerPort: 8082", "OPERATE_ADDR"},
		// References.
		{"secretKeyRef: {name: wallet-db-secret, key: RELAY_PASSWORD}",
			"secretKeyRef: {name: wallet-db-secret, key: RELAYS_PASSWORD}", "no key RELAYS_PASSWORD"},
		{"secretKeyRef: {name: wallet-db-secret, key: OWNER_PASSWORD}",
			"secretKeyRef: {name: db-secret, key: OWNER_PASSWORD}", "no Secret db-secret"},
		{"            - configMapRef:\n                name: kafka-config",
			"            - configMapRef:\n                name: kafka-confg", "no ConfigMap kafka-confg"},
		{"configMapKeyRef: {name: wallet-config, key: LOG_FORMAT}",
			"configMapKeyRef: {name: wallet-config, key: LOG_STYLE}", "no key LOG_STYLE"},
		{"          configMap:\n            name: postgres-init",
			"          configMap:\n            name: postgres-start", "no ConfigMap postgres-start"},
		{"subPath: roles.sh", "subPath: role.sh", "has no file role.sh"},
		{"- {name: data, mountPath: /data}", "- {name: cache, mountPath: /data}", "no volume cache"},
		{"            - {name: socket, mountPath: /var/run/postgresql}\n", "",
			"volume socket is mounted nowhere"},
		{"secretName: wallet-api-keys", "secretName: api-keys", "no Secret api-keys"},
		{"API_KEYS_FILE: /etc/wallet/api-keys/keys", "API_KEYS_FILE: /etc/wallet/api-keys/key",
			"API_KEYS_FILE"},
		{"laptop:read+write+operate:9b", "laptop:read+write+operate:9c", "laptop-key"},
		{"  RELAY_PASSWORD: laptop-relay ", "  RELAY_PASSWORD: laptop:relay ", "RELAY_PASSWORD"},
		// What the service reads.
		{"  DRAIN_DELAY: 5s", "  DRAIN_DELEY: 5s", "DRAIN_DELEY is no setting"},
		{"name: MIGRATE_URL", "name: MIGRATION_URL", "MIGRATION_URL is no setting"},
		{"wallet_relay:$(RELAY_PASSWORD)@", "wallet_relay:$(RELAYS_PASSWORD)@",
			"$(RELAYS_PASSWORD) is not set before"},
		{"wallet_relay:$(RELAY_PASSWORD)@", "wallet_relay:x@", "RELAY_PASSWORD is no setting"},
		{"wallet_service:$(SERVICE_PASSWORD)@", "wallet_owner:$(SERVICE_PASSWORD)@", "DATABASE_URL"},
		{"            - name: RELAY_PASSWORD\n" +
			"              valueFrom: {secretKeyRef: {name: wallet-db-secret, key: RELAY_PASSWORD}}\n" +
			"            # Without",
			"            - name: RELAY_PASSWORD\n" +
				"              valueFrom: {secretKeyRef: {name: wallet-db-secret, key: OWNER_PASSWORD}}\n" +
				"            # Without",
			"sees OWNER_PASSWORD"},
		// Stopping and rolling.
		{"SHUTDOWN_TIMEOUT: 15s", "SHUTDOWN_TIMEOUT: 25s", "terminationGracePeriodSeconds"},
		{"maxUnavailable: 0 ", "maxUnavailable: 1 ", "maxUnavailable"},
		{"          imagePullPolicy: IfNotPresent\n          envFrom",
			"          imagePullPolicy: Always\n          envFrom", "pull policy"},
		{"          image: wallet:latest\n          imagePullPolicy: IfNotPresent\n          envFrom",
			"          image: wallet:1.1\n          imagePullPolicy: IfNotPresent\n          envFrom",
			"another image than its init container"},
		{"image: redis:8.6.4", "image: redis", "not pinned"},
		{"image: apache/kafka:4.2.0", "image: apache/kafka:4.3.0", "drops transaction markers"},
		{"image: redis:8.6.4", "image: redis:8", "not pinned"},
		// Security and resources.
		{"allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true", "allowPrivilegeEscalation"},
		{"readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "readOnlyRootFilesystem"},
		{"drop: [ALL]", "drop: [KILL]", "drop ALL"},
		{"drop: [ALL]", "drop: [ALL]\n              add: [NET_ADMIN]", "adds capabilities"},
		{"runAsUser: 999", "runAsUser: 0", "root"},
		{"type: RuntimeDefault", "type: Unconfined", "seccomp"},
		{"automountServiceAccountToken: false", "automountServiceAccountToken: true", "token"},
		{"enableServiceLinks: false", "enableServiceLinks: true", "enableServiceLinks"},
		{"            limits: {cpu: \"2\", memory: 1280Mi}\n", "", "no limit of cpu"},
		{"requests: {cpu: 250m, memory: 768Mi}", "requests: {cpu: 250m, memory: 2Gi}",
			"requests more memory than its limit"},
		{"          livenessProbe:\n            tcpSocket: {port: client}\n            periodSeconds: 10\n" +
			"            timeoutSeconds: 5\n            failureThreshold: 6\n", "", "no liveness probe"},
		// The stores' own rules.
		{"- wal_level=logical", "- wal_level=replica", "wal_level=logical"},
		{"max_slot_wal_keep_size=2GB", "max_slot_wal_keep_size=4GB", "WAL may fill"},
		{"mountPath: /var/lib/postgresql}", "mountPath: /var/lib/postgresql/data}", "/var/lib/postgresql"},
		{"- 192mb", "- 256mb", "maxmemory"},
		{"- allkeys-lru", "- noeviction", "evict"},
		{"KAFKA_LOG_DIRS: /var/lib/kafka/data/log", "KAFKA_LOG_DIRS: /tmp/kraft", "KAFKA_LOG_DIRS"},
		{"KAFKA_DEFAULT_REPLICATION_FACTOR: \"1\"", "KAFKA_DEFAULT_REPLICATION_FACTOR: \"3\"",
			"KAFKA_DEFAULT_REPLICATION_FACTOR"},
		{"\n  KAFKA_CONTROLLER_QUORUM_VOTERS: 0@", "\n  KAFKA_CONTROLLER_QUORUM_VOTERS: 1@", "QUORUM_VOTERS"},
		{"KAFKA_AUTO_CREATE_TOPICS_ENABLE: \"false\"", "KAFKA_AUTO_CREATE_TOPICS_ENABLE: \"true\"",
			"AUTO_CREATE"},
		// Backups.
		{"  suspend: true\n", "  suspend: false\n", "CronJob wallet-backup is not suspended"},
		{"concurrencyPolicy: Forbid", "concurrencyPolicy: Allow", "CronJob wallet-backup may run twice"},
		{"claimName: wallet-backup", "claimName: wallet-backups", "no claim wallet-backups"},
		{"              value: wallet_owner\n", "              value: wallet_service\n", "as its owner"},
		{"args: [-rebuild]", "args: [-adopt]", "does not rebuild"},
		{"          restartPolicy: Never", "          restartPolicy: OnFailure", "ends must be seen"},
		{"image: postgres:18.4     # not", "image: postgres:17.9     # not", "image postgres:17.9 is not " +
			"postgres:18.4"},
		// Who may talk to whom.
		{"  name: redis\n  namespace: wallet\nspec:\n  podSelector:\n    matchLabels:\n      app: redis",
			"  name: redis\n  namespace: wallet\nspec:\n  podSelector:\n    matchLabels:\n      app: rediss",
			"no NetworkPolicy"},
		{"        - port: redis\n", "        - port: radis\n", `no container port "radis"`},
		{"    - from:\n        - podSelector:\n            matchLabels:\n              app: wallet-server\n" +
			"      ports:\n        - port: redis",
			"    - from:\n        - podSelector: {}\n      ports:\n        - port: redis", "lets others in"},
		{"  maxUnavailable: 1\n  selector:\n    matchLabels:\n      app: wallet-server",
			"  maxUnavailable: 1\n  selector:\n    matchLabels:\n      app: wallet",
			"PodDisruptionBudget wallet-server"},
		{"  maxUnavailable: 1\n  selector:\n    matchLabels:\n      app: wallet-server",
			"  minAvailable: 2\n  selector:\n    matchLabels:\n      app: wallet-server", "never be drained"},
	} {
		if !strings.Contains(text, f.old) {
			t.Errorf("the manifest has no longer %q", f.old)
			continue
		}
		m, err := parse(strings.Replace(text, f.old, f.new, 1), known)
		if err == nil {
			err = m.check()
		}
		if err == nil || !strings.Contains(err.Error(), f.want) {
			t.Errorf("with %q: %v, want an error with %q", f.new, err, f.want)
		}
	}
}

// The comment above the Secret says how to leave it out, and how to make it; both must go on working.
func TestSecretCanBeReplacedAsItSays(t *testing.T) {
	text, known := read(t, "k8s.yaml"), settings(t)
	recipe := regexp.MustCompile(`(?m)^#   (sed '[^']+') k8s\.yaml`).FindStringSubmatch(text)
	if recipe == nil {
		t.Fatal("no sed command in the comment")
	}
	sed := exec.Command("sh", "-c", recipe[1])
	sed.Stdin = strings.NewReader(text)
	rest, err := sed.Output()
	if err != nil {
		t.Fatal(err)
	}
	whole, err := parse(text, known)
	if err != nil {
		t.Fatal(err)
	}
	without, err := parse(string(rest), known)
	if err != nil {
		t.Fatal(err)
	}
	for name := range whole.secrets {
		delete(whole.names, "Secret "+name)
		if !strings.Contains(text, "create secret generic "+name+" ") {
			t.Errorf("no command makes Secret %s", name)
		}
	}
	if !maps.Equal(whole.names, without.names) {
		t.Errorf("%s leaves %v, want %v", recipe[1], slices.Sorted(maps.Keys(without.names)),
			slices.Sorted(maps.Keys(whole.names)))
	}
	if strings.Contains(string(rest), "laptop-") {
		t.Error("a default password is left")
	}
	made := regexp.MustCompile(`for k in ([A-Z ]+);`).FindStringSubmatch(text)
	var keys []string
	for _, k := range strings.Fields(made[1]) {
		keys = append(keys, k+"_PASSWORD")
	}
	slices.Sort(keys)
	if have := slices.Sorted(maps.Keys(whole.secrets["wallet-db-secret"])); !slices.Equal(keys, have) {
		t.Errorf("the command makes %v, the Secret has %v", keys, have)
	}
}

// The image has what the program needs and little else: its Dockerfile's own build command, run here.
func TestImage(t *testing.T) {
	dockerfile := read(t, "Dockerfile")
	m := regexp.MustCompile(`(?m)^RUN CGO_ENABLED=0 go build (.*) -o /wallet \.$`)
	build := m.FindStringSubmatch(dockerfile)
	if build == nil {
		t.Fatal("no build command in the Dockerfile")
	}
	for _, want := range []string{"FROM scratch", "USER 65532:65532", "EXPOSE 8080", `ENTRYPOINT ["/wallet"]`,
		"ENV LISTEN_ADDR=:8080", "/etc/ssl/certs/ca-certificates.crt"} {
		if !strings.Contains(dockerfile, want) {
			t.Errorf("the Dockerfile lacks %q", want)
		}
	}
	compiler := regexp.MustCompile(`(?m)^FROM golang:(\d+\.\d+)\.\d+-`).FindStringSubmatch(dockerfile)
	module := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(read(t, "go.mod"))
	if compiler == nil || module == nil || compiler[1] != module[1] {
		t.Errorf("the Dockerfile's Go %v is not go.mod's %v", compiler, module)
	}
	// What the build copies and the program embeds is let through, and nothing else.
	ignore := read(t, ".dockerignore")
	if !strings.Contains(ignore, "\n*\n") {
		t.Error(".dockerignore does not begin with everything")
	}
	for _, name := range []string{"go.mod", "go.sum", "*.go", "schema.sql"} {
		if !strings.Contains(ignore, "\n!"+name+"\n") || !strings.Contains(dockerfile, name) {
			t.Errorf("%s must be let through by .dockerignore and copied by the Dockerfile", name)
		}
	}
	if testing.Short() {
		t.Skip("-short: nothing is compiled")
	}
	binary := filepath.Join(t.TempDir(), "wallet")
	cmd := exec.Command("sh", "-c", "go build "+build[1]+" -o "+binary+" .")
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0", "VERSION=1.2.3", "GOOS=", "GOARCH=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err := exec.Command(binary, "-version").Output(); err != nil ||
		strings.TrimSpace(string(out)) != "1.2.3" {
		t.Errorf("-version says %q, %v", out, err)
	}
	file, err := os.Stat(binary)
	if err != nil {
		t.Fatal(err)
	}
	const certificates = 300 << 10
	t.Logf("the program has %d bytes", file.Size())
	if file.Size()+certificates > 20_000_000 {
		t.Errorf("the image would have %d bytes, more than 20 MB", file.Size()+certificates)
	}
}

// settings are the names of the variables that the service reads, out of main.go's list of them.
func settings(t *testing.T) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, "main.go"), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]string)
	for _, d := range file.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok || f.Name.Name != "settings" {
			continue
		}
		ast.Inspect(f, func(n ast.Node) bool {
			row, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			texts := make(map[string]string) // of the row's fields that are literal strings
			for _, element := range row.Elts {
				if field, ok := element.(*ast.KeyValueExpr); ok {
					name, isName := field.Key.(*ast.Ident)
					if text, isText := field.Value.(*ast.BasicLit); isName && isText {
						texts[name.Name], _ = strconv.Unquote(text.Value)
					}
				}
			}
			if texts["Name"] != "" {
				found[texts["Name"]] = texts["Default"]
			}
			return true
		})
	}
	if found["LISTEN_ADDR"] == "" || len(found) < 20 {
		t.Fatalf("main.go's list of settings was not found: %v", found)
	}
	return found
}

// -----------------------------------------------------------------------------------------------------------
// Reading
// -----------------------------------------------------------------------------------------------------------

type manifest struct {
	settings   map[string]string // the service's, with their defaults
	names      map[string]bool   // "Kind name"
	namespaces []*core.Namespace
	configs    map[string]map[string]string
	secrets    map[string]map[string]string
	services   map[string]*core.Service
	workloads  []*workload
	jobs       []*batch.CronJob
	claims     map[string]bool // that are no templates
	deployment *apps.Deployment
	budgets    []*policy.PodDisruptionBudget
	ingresses  []*networking.Ingress
	policies   []*networking.NetworkPolicy
	faults     []error
}

// workload is what makes pods.
type workload struct {
	kind, name  string
	replicas    int
	selector    *meta.LabelSelector
	pods        core.PodTemplateSpec
	claims      []core.PersistentVolumeClaim
	serviceName string
}

func (w *workload) String() string { return w.kind + " " + w.name }

// ends says that its pods do their work and go.
func (w *workload) ends() bool { return w.kind == "CronJob" }

func parse(text string, known map[string]string) (*manifest, error) {
	m := &manifest{settings: known, names: make(map[string]bool), configs: make(map[string]map[string]string),
		secrets: make(map[string]map[string]string), services: make(map[string]*core.Service),
		claims: make(map[string]bool)}
	for i, document := range regexp.MustCompile(`(?m)^---$`).Split(text, -1) {
		if err := m.add([]byte(document)); err != nil {
			return nil, fmt.Errorf("document %d: %w", i+1, err)
		}
	}
	return m, nil
}

func (m *manifest) add(document []byte) error {
	var head struct {
		meta.TypeMeta   `json:",inline"`
		meta.ObjectMeta `json:"metadata"`
	}
	if err := yaml.Unmarshal(document, &head); err != nil {
		return err
	}
	name := head.Kind + " " + head.Name
	strict := func(into any) error {
		if err := yaml.UnmarshalStrict(document, into); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	var err error
	switch head.APIVersion + " " + head.Kind {
	case "v1 Namespace":
		o := new(core.Namespace)
		err = strict(o)
		m.namespaces = append(m.namespaces, o)
	case "v1 ConfigMap":
		o := new(core.ConfigMap)
		err = strict(o)
		m.configs[o.Name] = o.Data
	case "v1 Secret":
		o := new(core.Secret)
		err = strict(o)
		m.secrets[o.Name] = o.StringData
	case "v1 Service":
		o := new(core.Service)
		err = strict(o)
		m.services[o.Name] = o
	case "apps/v1 StatefulSet":
		o := new(apps.StatefulSet)
		if err = strict(o); err == nil && o.Spec.Replicas == nil {
			err = fmt.Errorf("%s: say how many replicas", name)
		}
		if err == nil {
			m.workloads = append(m.workloads,
				&workload{o.Kind, o.Name, int(*o.Spec.Replicas), o.Spec.Selector, o.Spec.Template,
					o.Spec.VolumeClaimTemplates, o.Spec.ServiceName})
		}
	case "apps/v1 Deployment":
		o := new(apps.Deployment)
		if err = strict(o); err == nil && o.Spec.Replicas == nil {
			err = fmt.Errorf("%s: say how many replicas", name)
		}
		if err == nil {
			m.deployment = o
			m.workloads = append(m.workloads,
				&workload{o.Kind, o.Name, int(*o.Spec.Replicas), o.Spec.Selector, o.Spec.Template, nil, ""})
		}
	case "v1 PersistentVolumeClaim":
		o := new(core.PersistentVolumeClaim)
		err = strict(o)
		m.claims[o.Name] = true
	case "batch/v1 CronJob":
		o := new(batch.CronJob)
		if err = strict(o); err == nil {
			m.jobs = append(m.jobs, o)
			m.workloads = append(m.workloads,
				&workload{o.Kind, o.Name, 1, nil, o.Spec.JobTemplate.Spec.Template, nil, ""})
		}
	case "policy/v1 PodDisruptionBudget":
		o := new(policy.PodDisruptionBudget)
		err = strict(o)
		m.budgets = append(m.budgets, o)
	case "networking.k8s.io/v1 Ingress":
		o := new(networking.Ingress)
		err = strict(o)
		m.ingresses = append(m.ingresses, o)
	case "networking.k8s.io/v1 NetworkPolicy":
		o := new(networking.NetworkPolicy)
		err = strict(o)
		m.policies = append(m.policies, o)
	default:
		err = fmt.Errorf("%s %s is not among the stable objects that this test knows", head.APIVersion,
			head.Kind)
	}
	if err != nil {
		return err
	}
	if m.names[name] {
		return fmt.Errorf("%s is there twice", name)
	}
	m.names[name] = true
	if head.Kind != "Namespace" && head.Namespace != "wallet" {
		return fmt.Errorf("%s is in namespace %q, not wallet", name, head.Namespace)
	}
	return nil
}

// -----------------------------------------------------------------------------------------------------------
// Rules
// -----------------------------------------------------------------------------------------------------------

func (m *manifest) check() error {
	m.faults = nil
	for _, kind := range []string{"Namespace wallet", "Secret wallet-db-secret", "ConfigMap wallet-config",
		"StatefulSet postgres", "StatefulSet redis",
		"StatefulSet kafka", "Deployment wallet-server", "Service wallet-server", "Ingress wallet-server",
		"PodDisruptionBudget wallet-server"} {
		m.must(m.names[kind], "there is no %s", kind)
	}
	if len(m.faults) > 0 {
		return errors.Join(m.faults...)
	}
	m.must(m.namespaces[0].Labels["pod-security.kubernetes.io/enforce"] == "restricted",
		"the namespace does not enforce the restricted standard")
	for _, w := range m.workloads {
		m.checkSelectors(w)
		m.checkSecurity(w)
		m.checkVolumes(w)
		for _, c := range w.containers() {
			m.checkEnvironment(w, c)
			m.checkResources(w, c)
		}
		for i := range w.pods.Spec.Containers {
			if !w.ends() {
				m.checkProbes(w, &w.pods.Spec.Containers[i])
			}
		}
	}
	m.checkServices()
	m.checkJobs()
	m.checkAddresses()
	m.checkWayIn()
	m.checkPolicies()
	m.checkRolling()
	m.checkPostgres()
	m.checkRedis()
	m.checkKafka()
	return errors.Join(m.faults...)
}

func (m *manifest) must(ok bool, format string, args ...any) bool {
	if !ok {
		m.faults = append(m.faults, fmt.Errorf(format, args...))
	}
	return ok
}

func (m *manifest) workload(name string) *workload {
	for _, w := range m.workloads {
		if w.name == name {
			return w
		}
	}
	return nil
}

func (w *workload) containers() []*core.Container {
	var all []*core.Container
	for i := range w.pods.Spec.InitContainers {
		all = append(all, &w.pods.Spec.InitContainers[i])
	}
	for i := range w.pods.Spec.Containers {
		all = append(all, &w.pods.Spec.Containers[i])
	}
	return all
}

func (w *workload) container() *core.Container { return &w.pods.Spec.Containers[0] }

// port finds a container port by name or number.
func (w *workload) port(p intstr.IntOrString) (int32, error) {
	for _, c := range w.pods.Spec.Containers {
		for _, have := range c.Ports {
			if p.Type == intstr.String && have.Name == p.StrVal || p.Type == intstr.Int &&
				have.ContainerPort == p.IntVal {
				return have.ContainerPort, nil
			}
		}
	}
	return 0, fmt.Errorf("no container port %q", p.String())
}

func (w *workload) matches(s *meta.LabelSelector) bool {
	selector, err := meta.LabelSelectorAsSelector(s)
	return err == nil && !selector.Empty() && selector.Matches(labels.Set(w.pods.Labels))
}

// selected are the workloads whose pods a selector of labels finds.
func (m *manifest) selected(s *meta.LabelSelector) []*workload {
	return slices.DeleteFunc(slices.Clone(m.workloads), func(w *workload) bool { return !w.matches(s) })
}

func (m *manifest) checkSelectors(w *workload) {
	m.must(w.ends() || w.matches(w.selector), "%v: its selector does not match its own pods", w)
	m.must(w.serviceName == "" || m.services[w.serviceName] != nil, "%v: there is no Service %s", w,
		w.serviceName)
	for _, s := range w.pods.Spec.TopologySpreadConstraints {
		m.must(w.matches(s.LabelSelector), "%v: its topology spread does not match its own pods", w)
		m.must(s.MinDomains == nil && s.MatchLabelKeys == nil && s.NodeAffinityPolicy == nil &&
			s.NodeTaintsPolicy == nil, "%v: its topology spread has an alpha field of 1.25", w)
	}
}

func (m *manifest) checkSecurity(w *workload) {
	is := func(p *bool, want bool) bool { return p != nil && *p == want }
	pod := &w.pods.Spec
	m.must(is(pod.AutomountServiceAccountToken, false), "%v mounts a service account token", w)
	m.must(is(pod.EnableServiceLinks, false),
		"%v: enableServiceLinks is not false: variables that nobody asked for", w)
	m.must(!pod.HostNetwork && !pod.HostPID && !pod.HostIPC, "%v shares the host's namespaces", w)
	s := pod.SecurityContext
	if !m.must(s != nil, "%v has no securityContext", w) {
		return
	}
	m.must(is(s.RunAsNonRoot, true) && s.RunAsUser != nil && *s.RunAsUser > 0, "%v may run as root", w)
	m.must(s.SeccompProfile != nil && s.SeccompProfile.Type == core.SeccompProfileTypeRuntimeDefault,
		"%v: seccomp is not RuntimeDefault", w)
	for _, c := range w.containers() {
		s := c.SecurityContext
		if !m.must(s != nil, "%v, %s has no securityContext", w, c.Name) {
			continue
		}
		m.must(is(s.AllowPrivilegeEscalation, false) && (s.Privileged == nil || !*s.Privileged),
			"%v, %s: allowPrivilegeEscalation is not false", w, c.Name)
		m.must(is(s.ReadOnlyRootFilesystem, true), "%v, %s: readOnlyRootFilesystem is not true", w, c.Name)
		m.must(s.Capabilities != nil && slices.Equal(s.Capabilities.Drop, []core.Capability{"ALL"}),
			"%v, %s does not drop ALL capabilities", w, c.Name)
		m.must(s.Capabilities == nil || len(s.Capabilities.Add) == 0, "%v, %s adds capabilities", w, c.Name)
		m.must(s.RunAsUser == nil && s.RunAsNonRoot == nil && s.SeccompProfile == nil,
			"%v, %s: user and seccomp are the pod's", w, c.Name)
	}
}

func (m *manifest) checkVolumes(w *workload) {
	volumes := make(map[string]bool) // whether it is mounted
	files := make(map[string]map[string]string)
	for _, v := range w.pods.Spec.Volumes {
		volumes[v.Name] = false
		m.must(v.HostPath == nil, "%v: volume %s is the host's", w, v.Name)
		m.must(v.EmptyDir == nil || v.EmptyDir.SizeLimit != nil, "%v: volume %s has no size limit", w, v.Name)
		if v.ConfigMap != nil {
			files[v.Name] = m.configs[v.ConfigMap.Name]
			m.must(files[v.Name] != nil, "%v: there is no ConfigMap %s", w, v.ConfigMap.Name)
		}
		if v.Secret != nil {
			files[v.Name] = m.secrets[v.Secret.SecretName]
			m.must(files[v.Name] != nil, "%v: there is no Secret %s", w, v.Secret.SecretName)
		}
		if claim := v.PersistentVolumeClaim; claim != nil {
			m.must(w.ends(), "%v: volume %s: the claims here are templates", w, v.Name)
			m.must(m.claims[claim.ClaimName], "%v: there is no claim %s", w, claim.ClaimName)
		}
	}
	for _, c := range w.claims {
		volumes[c.Name] = false
		size := c.Spec.Resources.Requests[core.ResourceStorage]
		once := []core.PersistentVolumeAccessMode{core.ReadWriteOnce}
		m.must(!size.IsZero() && slices.Equal(c.Spec.AccessModes, once),
			"%v: claim %s wants a size and ReadWriteOnce", w, c.Name)
	}
	for _, c := range w.containers() {
		for _, mount := range c.VolumeMounts {
			_, there := volumes[mount.Name]
			m.must(there, "%v, %s: there is no volume %s", w, c.Name, mount.Name)
			volumes[mount.Name] = true
			if content := files[mount.Name]; content != nil && mount.SubPath != "" {
				m.must(content[mount.SubPath] != "", "%v, %s: volume %s has no file %s", w, c.Name,
					mount.Name, mount.SubPath)
			}
		}
		// A script that is run must be mounted.
		for _, word := range c.Command {
			if name, ok := strings.CutPrefix(word, "/init/"); ok {
				m.must(files["init"][name] != "", "%v, %s: there is no %s", w, c.Name, word)
			}
		}
	}
	for name, mounted := range volumes {
		m.must(mounted, "%v: volume %s is mounted nowhere", w, name)
	}
}

// environment is what a container sees: each variable's text, or a secret's name in brackets.
func (m *manifest) environment(w *workload, c *core.Container) map[string]string {
	seen := make(map[string]string)
	lookUp := func(kind, object, key string, values map[string]map[string]string) string {
		content, there := values[object]
		m.must(there, "%v, %s: there is no %s %s", w, c.Name, kind, object)
		value, known := content[key]
		m.must(!there || known, "%v, %s: %s %s has no key %s", w, c.Name, kind, object, key)
		return value
	}
	for _, from := range c.EnvFrom {
		m.must(from.ConfigMapRef != nil && from.SecretRef == nil, "%v, %s: secrets are named one by one", w,
			c.Name)
		if from.ConfigMapRef != nil {
			m.must(m.configs[from.ConfigMapRef.Name] != nil, "%v, %s: there is no ConfigMap %s", w, c.Name,
				from.ConfigMapRef.Name)
			maps.Copy(seen, m.configs[from.ConfigMapRef.Name])
		}
	}
	for _, e := range c.Env {
		value := e.Value
		if from := e.ValueFrom; from != nil {
			switch {
			case from.SecretKeyRef != nil:
				lookUp("Secret", from.SecretKeyRef.Name, from.SecretKeyRef.Key, m.secrets)
				value = "<" + from.SecretKeyRef.Key + ">"
			case from.ConfigMapKeyRef != nil:
				value = lookUp("ConfigMap", from.ConfigMapKeyRef.Name, from.ConfigMapKeyRef.Key, m.configs)
			case from.FieldRef != nil:
				value = "<" + from.FieldRef.FieldPath + ">"
			}
		}
		// $(NAME) is replaced if NAME stands before, and left alone otherwise.
		value = reference.ReplaceAllStringFunc(value, func(r string) string {
			name := r[2 : len(r)-1]
			m.must(seen[name] != "", "%v, %s: $(%s) is not set before %s", w, c.Name, name, e.Name)
			return seen[name]
		})
		seen[e.Name] = value
	}
	return seen
}

var reference = regexp.MustCompile(`\$\(([A-Za-z_]+)\)`)

// roles are the logins of each URL.
var roles = map[string]string{"DATABASE_URL": "wallet_service", "REPLICATION_URL": "wallet_relay",
	"MIGRATE_URL": "wallet_owner"}

func (m *manifest) checkEnvironment(w *workload, c *core.Container) {
	seen := m.environment(w, c)
	if w.ends() && strings.HasPrefix(c.Image, "postgres:") {
		m.must(seen["PGUSER"] == "wallet_owner" && seen["PGPASSWORD"] == "<OWNER_PASSWORD>" &&
			m.services[seen["PGHOST"]] != nil, "%v, %s does not come to the database as its owner", w, c.Name)
	}
	if w.name != "wallet-server" && w.name != "wallet-restore" || !strings.HasPrefix(c.Image, "wallet:") {
		return
	}
	used := make(map[string]bool)
	for _, e := range c.Env {
		for _, r := range reference.FindAllStringSubmatch(e.Value, -1) {
			used[r[1]] = true
		}
	}
	for name, value := range seen {
		_, setting := m.settings[name]
		m.must(setting || used[name] || name == "GOMEMLIMIT",
			"%v, %s: %s is no setting of the service, and used in none", w, c.Name, name)
		if role, isURL := roles[name]; isURL {
			own := "postgres://" + role
			m.must(strings.HasPrefix(value, own+"@") || strings.HasPrefix(value, own+":<"),
				"%v, %s: %s is not %s's", w, c.Name, name, role)
		}
	}
	// Each container sees the secrets of its task only.
	allowed := []string{"<SERVICE_PASSWORD>", "<RELAY_PASSWORD>"}
	if c != w.container() {
		allowed = []string{"<OWNER_PASSWORD>"}
	} else if w.ends() {
		allowed = append(allowed, "<OWNER_PASSWORD>")
		m.must(slices.Equal(c.Args, []string{"-rebuild"}) && seen["MIGRATE_URL"] != "" &&
			seen["KAFKA_BROKERS"] != "", "%v, %s does not rebuild", w, c.Name)
	}
	for _, value := range seen {
		for _, secret := range regexp.MustCompile(`<[A-Z_]+>`).FindAllString(value, -1) {
			m.must(slices.Contains(allowed, secret), "%v, %s sees %s", w, c.Name, strings.Trim(secret, "<>"))
		}
	}
	for _, name := range []string{"DATABASE_URL", "REPLICATION_URL"} {
		m.must(seen[name] != "", "%v, %s has no %s", w, c.Name, name)
	}
	m.must(c == w.container() || slices.Equal(c.Args, []string{"-migrate"}) && seen["MIGRATE_URL"] != "",
		"%v, %s does not migrate", w, c.Name)
	// Passwords are parts of URLs.
	for name, value := range m.secrets["wallet-db-secret"] {
		m.must(regexp.MustCompile(`^[A-Za-z0-9-]+$`).MatchString(value), "%s cannot stand in a URL", name)
	}
}

func (m *manifest) checkResources(w *workload, c *core.Container) {
	for _, name := range []core.ResourceName{core.ResourceCPU, core.ResourceMemory} {
		request, limit := c.Resources.Requests[name], c.Resources.Limits[name]
		m.must(!request.IsZero(), "%v, %s has no request of %s", w, c.Name, name)
		m.must(!limit.IsZero(), "%v, %s has no limit of %s", w, c.Name, name)
		m.must(limit.IsZero() || request.Cmp(limit) <= 0, "%v, %s requests more %s than its limit", w, c.Name,
			name)
	}
	own := strings.HasPrefix(c.Image, "wallet:")
	m.must(own && c.ImagePullPolicy == core.PullIfNotPresent || !own && c.ImagePullPolicy == "",
		"%v, %s: pull policy %q does not fit image %s", w, c.Name, c.ImagePullPolicy, c.Image)
	m.must(own || regexp.MustCompile(`^[a-z/]+:\d+\.\d+(\.\d+)?$`).MatchString(c.Image),
		"%v, %s: image %s is not pinned", w, c.Name, c.Image)
	m.must(!strings.HasPrefix(c.Image, "postgres:") || len(strings.Split(c.Image, ".")) == 2,
		"%v, %s: image %s is not pinned", w, c.Name, c.Image)
	m.must(!strings.HasPrefix(c.Image, "redis:") || len(strings.Split(c.Image, ".")) == 3,
		"%v, %s: image %s is not pinned", w, c.Name, c.Image)
	m.must(!strings.Contains(c.Image, "bitnami"), "%v, %s: that image is retired", w, c.Name)
	m.must(c.Image != "apache/kafka:4.3.0", "%v, %s: that broker drops transaction markers (KAFKA-20734)", w,
		c.Name)
}

func (m *manifest) checkProbes(w *workload, c *core.Container) {
	for what, probe := range map[string]*core.Probe{"startup": c.StartupProbe, "liveness": c.LivenessProbe,
		"readiness": c.ReadinessProbe} {
		if !m.must(probe != nil, "%v, %s has no %s probe", w, c.Name, what) {
			continue
		}
		var err error
		switch {
		case probe.HTTPGet != nil:
			_, err = w.port(probe.HTTPGet.Port)
			want := "/healthz"
			if what == "readiness" {
				want = "/readyz"
			}
			m.must(probe.HTTPGet.Path == want, "%v, %s: %s probes %s, not %s", w, c.Name, what,
				probe.HTTPGet.Path, want)
		case probe.TCPSocket != nil:
			_, err = w.port(probe.TCPSocket.Port)
		case probe.Exec == nil:
			err = errors.New("it does nothing")
		}
		m.must(err == nil, "%v, %s: %s probe: %v", w, c.Name, what, err)
	}
}

func (m *manifest) checkServices() {
	for name, s := range m.services {
		found := m.selected(&meta.LabelSelector{MatchLabels: s.Spec.Selector})
		if !m.must(len(found) == 1, "Service %s selects %d workloads", name, len(found)) {
			continue
		}
		for _, p := range s.Spec.Ports {
			_, err := found[0].port(p.TargetPort)
			m.must(err == nil, "Service %s: %v", name, err)
		}
	}
	for _, b := range m.budgets {
		found := m.selected(b.Spec.Selector)
		if m.must(len(found) == 1, "PodDisruptionBudget %s selects %d workloads", b.Name, len(found)) &&
			b.Spec.MinAvailable != nil {
			m.must(b.Spec.MinAvailable.IntValue() < found[0].replicas,
				"PodDisruptionBudget %s: a node could never be drained", b.Name)
		}
	}
}

// checkJobs: they are there for the day when somebody asks.
func (m *manifest) checkJobs() {
	for _, j := range m.jobs {
		m.must(j.Spec.Suspend != nil && *j.Spec.Suspend, "CronJob %s is not suspended", j.Name)
		m.must(j.Spec.ConcurrencyPolicy == batch.ForbidConcurrent, "CronJob %s may run twice at a time",
			j.Name)
		pod := &j.Spec.JobTemplate.Spec.Template.Spec
		m.must(pod.RestartPolicy == core.RestartPolicyNever && j.Spec.JobTemplate.Spec.BackoffLimit != nil,
			"CronJob %s: its pods' ends must be seen, and their number bounded", j.Name)
		for _, c := range append(slices.Clone(pod.InitContainers), pod.Containers...) {
			own := strings.HasPrefix(c.Image, "wallet:")
			image := m.workload("postgres").container().Image
			if own {
				image = m.workload("wallet-server").container().Image
			}
			m.must(c.Image == image, "CronJob %s, %s: image %s is not %s", j.Name, c.Name, c.Image, image)
		}
	}
	m.must(len(m.jobs) == 2, "there are %d CronJobs", len(m.jobs))
}

// checkAddresses: where the service is told that the others are, a Service is.
func (m *manifest) checkAddresses() {
	config := m.configs["wallet-config"]
	address := func(setting, hostPort string) {
		host, port, err := net.SplitHostPort(hostPort)
		service := m.services[host]
		if !m.must(err == nil && service != nil, "%s: there is no Service %s", setting, host) {
			return
		}
		m.must(slices.ContainsFunc(service.Spec.Ports, func(p core.ServicePort) bool {
			return fmt.Sprint(p.Port) == port
		}), "%s: Service %s has no port %s", setting, host, port)
	}
	redis, err := neturl.Parse(config["REDIS_URL"])
	if m.must(err == nil && config["REDIS_URL"] != "", "REDIS_URL: %v", err) {
		address("REDIS_URL", redis.Host)
	}
	for broker := range strings.SplitSeq(config["KAFKA_BROKERS"], ",") {
		address("KAFKA_BROKERS", broker)
	}
	w := m.workload("wallet-server")
	for _, c := range w.containers() {
		for name, value := range m.environment(w, c) {
			if roles[name] != "" {
				_, rest, _ := strings.Cut(value, "@")
				hostPort, _, _ := strings.Cut(rest, "/")
				address(name, hostPort)
			}
		}
	}
	for _, setting := range []string{"LISTEN_ADDR", "OPERATE_ADDR"} {
		_, port, err := net.SplitHostPort(config[setting])
		number, _ := strconv.Atoi(port)
		_, portErr := w.port(intstr.FromInt(number))
		m.must(err == nil && portErr == nil, "%s %q is not where the container's port is", setting,
			config[setting])
		m.must(setting != "OPERATE_ADDR" || w.pods.Annotations["prometheus.io/port"] == port,
			"prometheus.io/port is not where the metrics are")
	}
	m.must(slices.ContainsFunc(w.container().VolumeMounts, func(v core.VolumeMount) bool {
		key, found := strings.CutPrefix(config["API_KEYS_FILE"], v.MountPath+"/")
		return found && v.Name == "api-keys" && m.secrets["wallet-api-keys"][key] != ""
	}), "API_KEYS_FILE %s is no file of the mounted Secret", config["API_KEYS_FILE"])
	m.must(strings.Contains(m.secrets["wallet-api-keys"]["keys"],
		fmt.Sprintf(":%x\n",
			sha256.Sum256([]byte("laptop-key")))), "the README's laptop-key does not fit the Secret")
}

func (m *manifest) checkWayIn() {
	s := m.services["wallet-server"]
	target, err := m.workload("wallet-server").port(s.Spec.Ports[0].TargetPort)
	m.must(err == nil && len(s.Spec.Ports) == 1 && s.Spec.Ports[0].Port == 80 && target == 8080,
		"Service wallet-server does not lead from port 80 to 8080")
	for _, i := range m.ingresses {
		m.must(i.Spec.IngressClassName != nil && *i.Spec.IngressClassName == "nginx",
			"Ingress %s is of another class than nginx", i.Name)
		m.must(i.Annotations["nginx.ingress.kubernetes.io/ssl-redirect"] == "false",
			"Ingress %s: ssl-redirect is not off", i.Name)
		for _, rule := range i.Spec.Rules {
			m.must(rule.Host == "wallet.local", "Ingress %s is for host %s", i.Name, rule.Host)
			for _, path := range rule.HTTP.Paths {
				b := path.Backend.Service
				service := m.services[b.Name]
				m.must(service != nil && slices.ContainsFunc(service.Spec.Ports,
					func(p core.ServicePort) bool {
						return b.Port.Name != "" && p.Name == b.Port.Name || b.Port.Name == "" &&
							p.Port == b.Port.Number
					}), "Ingress %s leads to a port that Service %s has not", i.Name, b.Name)
			}
		}
	}
}

func (m *manifest) checkPolicies() {
	wallet := m.workload("wallet-server")
	for _, name := range []string{"postgres", "redis", "kafka"} {
		w := m.workload(name)
		guarded, walletMay := false, false
		for _, p := range m.policies {
			if !w.matches(&p.Spec.PodSelector) ||
				!slices.Contains(p.Spec.PolicyTypes, networking.PolicyTypeIngress) {
				continue
			}
			guarded = true
			for _, rule := range p.Spec.Ingress {
				m.must(len(rule.From) > 0 && len(rule.Ports) > 0,
					"NetworkPolicy %s lets others in, or to every port", p.Name)
				for _, port := range rule.Ports {
					_, err := w.port(*port.Port)
					m.must(err == nil, "NetworkPolicy %s: %v", p.Name, err)
				}
				for _, peer := range rule.From {
					known := peer.PodSelector != nil && peer.NamespaceSelector == nil &&
						peer.IPBlock == nil &&
						(wallet.matches(peer.PodSelector) || w.matches(peer.PodSelector) ||
							name != "redis" && m.workload("wallet-restore").matches(peer.PodSelector))
					m.must(known, "NetworkPolicy %s lets others in than the service", p.Name)
					walletMay = walletMay || known && wallet.matches(peer.PodSelector)
				}
			}
		}
		m.must(guarded, "no NetworkPolicy guards %s", name)
		m.must(!guarded || walletMay, "the service may not reach %s", name)
	}
}

func (m *manifest) checkRolling() {
	d := m.deployment
	rolling := d.Spec.Strategy.RollingUpdate
	m.must(rolling != nil && rolling.MaxUnavailable != nil && rolling.MaxUnavailable.IntValue() == 0 &&
		rolling.MaxUnavailable.Type == intstr.Int,
		"Deployment wallet-server: maxUnavailable is not 0")
	m.must(*d.Spec.Replicas >= 2, "Deployment wallet-server has no second replica")
	pod := &d.Spec.Template.Spec
	total := time.Duration(0)
	for _, name := range []string{"DRAIN_DELAY", "SHUTDOWN_TIMEOUT"} {
		length, err := time.ParseDuration(m.configs["wallet-config"][name])
		m.must(err == nil && length > 0, "%s: %v", name, err)
		total += length
	}
	m.must(pod.TerminationGracePeriodSeconds != nil &&
		time.Duration(*pod.TerminationGracePeriodSeconds)*time.Second > total,
		"terminationGracePeriodSeconds is not above DRAIN_DELAY + SHUTDOWN_TIMEOUT (%v)", total)
	for _, c := range pod.InitContainers {
		m.must(c.Image == pod.Containers[0].Image, "the service runs another image than its init container")
	}
}

func (m *manifest) checkPostgres() {
	w := m.workload("postgres")
	c := w.container()
	set := make(map[string]string)
	for i := 0; i+1 < len(c.Args); i += 2 {
		name, value, _ := strings.Cut(c.Args[i+1], "=")
		m.must(c.Args[i] == "-c", "postgres: %q", c.Args)
		set[name] = value
	}
	m.must(set["wal_level"] == "logical", "postgres lacks wal_level=logical, which the relay reads")
	m.must(set["synchronous_commit"] == "on", "postgres: an answered request must be on disk")
	volume := w.claims[0].Spec.Resources.Requests[core.ResourceStorage]
	var wal resource.Quantity
	for _, name := range []string{"max_slot_wal_keep_size", "max_wal_size"} {
		size, err := resource.ParseQuantity(strings.TrimSuffix(set[name], "B") + "i")
		m.must(err == nil, "postgres: %s: %v", name, err)
		wal.Add(size)
	}
	m.must(volume.Cmp(resource.MustParse("5Gi")) == 0 && wal.Cmp(resource.MustParse("4Gi")) < 0,
		"the WAL may fill Postgres' volume: %v of %v", &wal, &volume)
	m.must(slices.ContainsFunc(c.VolumeMounts, func(v core.VolumeMount) bool {
		return v.Name == w.claims[0].Name && v.MountPath == "/var/lib/postgresql"
	}), "Postgres 18's volume belongs at /var/lib/postgresql")
	// Every password that the roles are made with is there.
	seen := m.environment(w, c)
	reads := regexp.MustCompile(`\\getenv \w+ (\w+)`)
	for _, name := range reads.FindAllStringSubmatch(m.configs["postgres-init"]["roles.sh"], -1) {
		m.must(seen[name[1]] == "<"+name[1]+">", "roles.sh reads %s, which Postgres' container has not",
			name[1])
	}
	for setting, role := range roles {
		m.must(strings.Contains(m.configs["postgres-init"]["roles.sh"], "CREATE ROLE "+role+" "),
			"roles.sh does not make %s, which %s names", role, setting)
	}
}

func (m *manifest) checkRedis() {
	w := m.workload("redis")
	c := w.container()
	option := func(name string) string {
		if i := slices.Index(c.Args, "--"+name); i >= 0 && i+1 < len(c.Args) {
			return c.Args[i+1]
		}
		return "not given"
	}
	most, err := resource.ParseQuantity(strings.TrimSuffix(option("maxmemory"), "mb") + "Mi")
	limit := c.Resources.Limits[core.ResourceMemory]
	most.Add(resource.MustParse("32Mi")) // its own
	m.must(err == nil && most.Cmp(limit) < 0,
		"redis: maxmemory %s is not well below the container's limit %v", option("maxmemory"), &limit)
	m.must(option("maxmemory-policy") == "allkeys-lru", "redis does not evict as a cache should: %s",
		option("maxmemory-policy"))
	m.must(option("save") == "" && option("appendonly") == "no", "redis must not load an old cache from disk")
	size := w.claims[0].Spec.Resources.Requests[core.ResourceStorage]
	m.must(size.Cmp(resource.MustParse("1Gi")) == 0, "redis' claim is not 1Gi")
}

func (m *manifest) checkKafka() {
	w, config := m.workload("kafka"), m.configs["kafka-config"]
	c := w.container()
	m.must(slices.ContainsFunc(c.VolumeMounts, func(v core.VolumeMount) bool {
		return v.Name == w.claims[0].Name && strings.HasPrefix(config["KAFKA_LOG_DIRS"], v.MountPath+"/")
	}), "KAFKA_LOG_DIRS %s is not below the claim's mount", config["KAFKA_LOG_DIRS"])
	m.must(config["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false",
		"KAFKA_AUTO_CREATE_TOPICS_ENABLE: a mistyped topic must be an error")
	id, err := base64.RawURLEncoding.DecodeString(config["CLUSTER_ID"])
	m.must(err == nil && len(id) == 16, "CLUSTER_ID is not 16 bytes in base64")
	var voters []string
	for i := range w.replicas {
		voters = append(voters, fmt.Sprintf("%d@%s-%d.%s:9093", i, w.name, i, w.serviceName))
	}
	m.must(config["KAFKA_CONTROLLER_QUORUM_VOTERS"] == strings.Join(voters, ","),
		"KAFKA_CONTROLLER_QUORUM_VOTERS is not %s", strings.Join(voters, ","))
	for name, value := range config {
		n, _ := strconv.Atoi(value)
		if strings.HasSuffix(name, "REPLICATION_FACTOR") {
			m.must(n == min(w.replicas, 3), "%s is %s, with %d brokers", name, value, w.replicas)
		}
		if strings.HasSuffix(name, "MIN_ISR") || name == "KAFKA_MIN_INSYNC_REPLICAS" {
			m.must(n == max(1, min(w.replicas, 3)-1), "%s is %s, with %d brokers", name, value, w.replicas)
		}
	}
	advertised := m.environment(w, c)["KAFKA_ADVERTISED_LISTENERS"]
	m.must(advertised == "CLIENT://<metadata.name>."+w.serviceName+":9092",
		"KAFKA_ADVERTISED_LISTENERS is %s", advertised)
	m.must(m.services[w.serviceName] != nil &&
		m.services[w.serviceName].Spec.ClusterIP == core.ClusterIPNone &&
		m.services[w.serviceName].Spec.PublishNotReadyAddresses,
		"Service kafka must be headless, and publish brokers that are not ready: "+
			"they become ready by finding each other")
}
