// What -secure adds to -kafka apache: beside each broker's plain listener, which the stack itself and the
// brokers among themselves use, one by TLS that demands a client certificate and SASL, as in production. Its
// authority, certificates and password are made here.

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	secureUser = "wallet"
	// secureSession is how long a connection lives without authenticating again, which brokers in the cloud
	// demand too; so short that a test sees it.
	secureSession = 3 * time.Second
)

// credentials are the cluster's and its clients', in files of one folder.
type credentials struct {
	dir      string
	password string // secureUser's
}

// newCredentials makes new certificates at each start, but one password: the controller's data has it too.
func newCredentials(dir string) (*credentials, error) {
	c := &credentials{dir: dir}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	password, _ := os.ReadFile(c.file("password"))
	if len(password) == 0 {
		password = []byte(rand.Text())
	}
	c.password = string(password)
	authority, err := issue(nil, x509.Certificate{Subject: pkix.Name{CommonName: "wallet dev authority"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	if err != nil {
		return nil, err
	}
	broker, err := issue(authority, x509.Certificate{Subject: pkix.Name{CommonName: "broker"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	if err != nil {
		return nil, err
	}
	client, err := issue(authority, x509.Certificate{Subject: pkix.Name{CommonName: "client"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		return nil, err
	}
	return c, errors.Join(
		os.WriteFile(c.file("password"), password, 0o600),
		os.WriteFile(c.file("ca.pem"), authority.certPEM, 0o644),
		os.WriteFile(c.file("broker.pem"), append(broker.keyPEM, broker.certPEM...), 0o600),
		os.WriteFile(c.file("client.pem"), client.certPEM, 0o644),
		os.WriteFile(c.file("client.key"), client.keyPEM, 0o600))
}

func (c *credentials) file(name string) string { return filepath.Join(c.dir, name) }

// issued is a certificate and its key.
type issued struct {
	cert            *x509.Certificate
	key             *ecdsa.PrivateKey
	certPEM, keyPEM []byte
}

// issue has an authority sign a certificate, or without one the certificate itself.
func issue(authority *issued, template x509.Certificate) (*issued, error) {
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().AddDate(1, 0, 0)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	by := authority
	if by == nil {
		by = &issued{cert: &template, key: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, by.cert, &key.PublicKey, by.key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	return &issued{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})}, err
}

// format is what makes the user known to SCRAM, of which the cluster's metadata keeps a salted hash.
func (c *credentials) format() []string {
	var args []string
	for _, mechanism := range []string{"SCRAM-SHA-256", "SCRAM-SHA-512"} {
		args = append(args, "--add-scram", fmt.Sprintf("%s=[name=%s,password=%s]", mechanism, secureUser,
			c.password))
	}
	return args
}

// properties are the broker's for the listener SECURED. PLAIN's users stand in its configuration.
func (c *credentials) properties() string {
	const login = "org.apache.kafka.common.security."
	var text strings.Builder
	for _, setting := range []string{
		"ssl.keystore.type=PEM",
		"ssl.keystore.location=" + c.file("broker.pem"),
		"ssl.truststore.type=PEM",
		"ssl.truststore.location=" + c.file("ca.pem"),
		"ssl.client.auth=required",
		fmt.Sprintf("connections.max.reauth.ms=%d", secureSession.Milliseconds()),
		"sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
		fmt.Sprintf("plain.sasl.jaas.config=%splain.PlainLoginModule required user_%s=%q;", login, secureUser,
			c.password),
		"scram-sha-256.sasl.jaas.config=" + login + "scram.ScramLoginModule required;",
		"scram-sha-512.sasl.jaas.config=" + login + "scram.ScramLoginModule required;",
	} {
		text.WriteString("listener.name.secured." + setting + "\n")
	}
	return text.String()
}

// settings are what a client needs, as the service's environment.
func (c *credentials) settings(brokers []string) map[string]string {
	return map[string]string{
		"KAFKA_BROKERS":        strings.Join(brokers, ","),
		"KAFKA_TLS":            "true",
		"KAFKA_TLS_CA":         c.file("ca.pem"),
		"KAFKA_TLS_CERT":       c.file("client.pem"),
		"KAFKA_TLS_KEY":        c.file("client.key"),
		"KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
		"KAFKA_SASL_USER":      secureUser,
		"KAFKA_SASL_PASSWORD":  c.password,
	}
}
