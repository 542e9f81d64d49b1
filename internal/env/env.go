// Package env reads settings from environment variables by one table, which also prints them as help.
//
// It touches only the variables that the table names, and what its setters point to. A bad value is one
// sentence that says what to do, and never shows a secret.
package env

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Setting is one environment variable.
type Setting struct {
	Name    string
	Default string // as one would write it; empty: none
	Help    string
	Group   string // of this one and of those that follow it, up to the next that names one
	Main    bool   // one of the few that everybody sets
	Secret  bool   // no error shows its value
	// Set takes a value, or says what one should be: "a whole number from 1 to 9".
	Set func(value string) error
}

// Read sets every setting that has a value or a default, in the table's order, up to the first bad one. A
// variable that is empty counts as not there.
func Read(settings []Setting, getenv func(string) string) error {
	for _, s := range settings {
		value := getenv(s.Name)
		if value == "" {
			value = s.Default
		}
		if value == "" {
			continue
		}
		if err := s.Set(value); err != nil {
			if s.Secret {
				value = "a secret, not shown"
			}
			return fmt.Errorf("set %s to %w (it is %q): %s", s.Name, err, value, s.Help)
		}
	}
	return nil
}

// PrintMain writes a line for each setting that everybody sets.
func PrintMain(w io.Writer, settings []Setting) {
	for _, s := range settings {
		if s.Main {
			fmt.Fprintf(w, "  %-13s %s\n", s.Name, s.Help)
		}
	}
}

// PrintNames writes the names of all others, group by group, in lines of at most so many characters.
func PrintNames(w io.Writer, settings []Setting, width int) {
	const indent = "            "
	line := ""
	flush := func() {
		if line != "" && line != indent {
			fmt.Fprintln(w, line)
		}
		line = indent
	}
	for _, s := range settings {
		if s.Group != "" {
			flush()
			line = fmt.Sprintf("  %-*s", len(indent)-2, s.Group)
		}
		switch {
		case s.Main:
			continue
		case len(line)+len(s.Name) >= width:
			flush()
		case len(line) > len(indent):
			line += " "
		}
		line += s.Name
	}
	flush()
}

// Print writes a line for each setting: its name, help and default.
func Print(w io.Writer, settings []Setting) {
	for _, s := range settings {
		if s.Group != "" {
			fmt.Fprintf(w, "%s:\n", s.Group)
		}
		fmt.Fprintf(w, "  %-23s %s", s.Name, s.Help)
		if s.Default != "" {
			fmt.Fprintf(w, " (default %s)", s.Default)
		}
		fmt.Fprintln(w)
	}
}

// Text takes any value.
func Text(p *string) func(string) error {
	return func(v string) error { *p = v; return nil }
}

// URL takes a URL of one of these schemes.
func URL(p *string, schemes ...string) func(string) error {
	return func(v string) error {
		for _, scheme := range schemes {
			if strings.HasPrefix(v, scheme+"://") {
				*p = v
				return nil
			}
		}
		return fmt.Errorf("a URL that begins with %s://", schemes[0])
	}
}

// Matching takes at most lenMax characters out of chars.
func Matching(p *string, lenMax int, chars string) func(string) error {
	return func(v string) error {
		if len(v) > lenMax || strings.Trim(v, chars) != "" {
			return fmt.Errorf("at most %d characters of %s", lenMax, chars)
		}
		*p = v
		return nil
	}
}

// OneOf takes one of these values. An empty one among them is not named in the refusal.
func OneOf(p *string, values ...string) func(string) error {
	return func(v string) error {
		for _, allowed := range values {
			if v == allowed {
				*p = v
				return nil
			}
		}
		return fmt.Errorf("one of %s", strings.TrimPrefix(strings.Join(values, ", "), ", "))
	}
}

// HostPorts takes addresses host:port, comma-separated.
func HostPorts(p *[]string) func(string) error {
	return func(v string) error {
		for _, item := range strings.Split(v, ",") {
			item = strings.TrimSpace(item)
			host, port, err := net.SplitHostPort(item)
			if _, badPort := strconv.ParseUint(port, 10, 16); err != nil || badPort != nil || host == "" {
				return fmt.Errorf("host:port, comma-separated")
			}
			*p = append(*p, item)
		}
		return nil
	}
}

// Prefixes takes address ranges in CIDR form, comma-separated.
func Prefixes(p *[]netip.Prefix) func(string) error {
	return func(v string) error {
		for item := range strings.SplitSeq(v, ",") {
			prefix, err := netip.ParsePrefix(strings.TrimSpace(item))
			if err != nil {
				return fmt.Errorf("address ranges such as 10.0.0.0/8, comma-separated")
			}
			*p = append(*p, prefix)
		}
		return nil
	}
}

// Int takes a whole number within bounds.
func Int[T int | int16 | int32](p *T, least, most T) func(string) error {
	return func(v string) error {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < int64(least) || n > int64(most) {
			return fmt.Errorf("a whole number from %d to %d", least, most)
		}
		*p = T(n)
		return nil
	}
}

// Duration takes a duration within bounds, in Go's form.
func Duration(p *time.Duration, least, most time.Duration) func(string) error {
	return func(v string) error {
		d, err := time.ParseDuration(v)
		if err != nil || d < least || d > most {
			return fmt.Errorf("a duration from %v to %v, such as 1500ms, 30s or 24h", least, most)
		}
		*p = d
		return nil
	}
}

// Bool takes true or false, and what else strconv.ParseBool takes.
func Bool(p *bool) func(string) error {
	return func(v string) error {
		b, err := strconv.ParseBool(v)
		if err != nil {
			return fmt.Errorf("true or false")
		}
		*p = b
		return nil
	}
}

// Level takes a log level of slog.
func Level(p *slog.Level) func(string) error {
	return func(v string) error {
		if p.UnmarshalText([]byte(v)) != nil {
			return fmt.Errorf("debug, info, warn or error")
		}
		return nil
	}
}
