// Package cmdline reads the command line of a program that serves, or does one other job and exits. All else
// is set by environment variables.
//
// It touches the two writers that it is given. It promises that help fits a screen and goes where it can be
// searched, and that an error is one line, the last one.
package cmdline

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"

	"wallet/internal/env"
)

// Job is what a program does in place of serving.
type Job struct {
	Name     string
	Argument string // what it takes, in capitals; empty: nothing
	Help     string
	Options  []Job // that may be said with it; each takes an argument
}

// Asked is what a command line asks for.
type Asked struct {
	Job      string            // empty: serve
	Argument string            // the job's
	Options  map[string]string // the job's, by name, as far as they were said
}

// Program is what help says.
type Program struct {
	Name     string
	Serves   string // what it does without a job
	Jobs     []Job
	Settings []env.Setting
	Try      string // how to try it without any setting
}

// listJob is the one that each program has besides its own.
var listJob = Job{Name: "settings", Help: "print each setting with its default and meaning, then exit"}

// Parse returns what is asked for. Where nothing is left to do, done is true and the program ends with the
// status.
func (p *Program) Parse(args []string, stdout, stderr io.Writer) (asked Asked, status int, done bool) {
	var named []string
	asked.Options = make(map[string]string)
	jobOf := make(map[string]string) // of each option
	flags := flag.NewFlagSet(p.Name, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // what it has to say is said here
	for _, j := range append(p.Jobs, listJob) {
		take := func(value string) error {
			named, asked.Argument = append(named, j.Name), value
			return nil
		}
		if j.Argument != "" {
			flags.Func(j.Name, "", take)
		} else {
			flags.BoolFunc(j.Name, "", func(value string) error {
				if value == "true" {
					return take("")
				}
				return errors.New("it takes no value")
			})
		}
		for _, o := range j.Options {
			jobOf[o.Name] = j.Name
			flags.Func(o.Name, "", func(value string) error {
				asked.Options[o.Name] = value
				return nil
			})
		}
	}
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		p.help(stdout)
		return Asked{}, 0, true
	case err == nil && flags.NArg() > 0:
		err = fmt.Errorf("leave out %q: there are options and environment variables only", flags.Arg(0))
	case err == nil && len(named) > 1:
		err = fmt.Errorf("say -%s or -%s, not both: each is a job of its own", named[0], named[1])
	case err == nil:
		for option := range asked.Options {
			if len(named) == 0 || named[0] != jobOf[option] {
				err = fmt.Errorf("say -%s with -%s", option, jobOf[option])
			}
		}
	}
	switch {
	case err != nil:
		fmt.Fprintf(stderr, "%s: %v (%[1]s -h lists the options)\n", p.Name, err)
		return Asked{}, 2, true
	case len(named) == 0:
		return asked, 0, false
	case named[0] == listJob.Name:
		env.Print(stdout, p.Settings)
		return Asked{}, 0, true
	}
	asked.Job = named[0]
	return asked, 0, false
}

// help is what fits a screen of 40 lines by 100 columns.
func (p *Program) help(w io.Writer) {
	fmt.Fprintf(w, "Usage:\n  %-28s %s\n", p.Name, p.Serves)
	for _, j := range append(p.Jobs, listJob) {
		fmt.Fprintf(w, "  %-28s %s\n", strings.TrimSpace(p.Name+" -"+j.Name+" "+j.Argument), j.Help)
		for _, o := range j.Options {
			fmt.Fprintf(w, "  %-28s %s\n", "    -"+o.Name+" "+o.Argument, o.Help)
		}
	}
	fmt.Fprintf(w, "\nSettings are environment variables. These matter:\n")
	env.PrintMain(w, p.Settings)
	fmt.Fprintf(w, "\nThe others have defaults (%s -settings tells them):\n", p.Name)
	env.PrintNames(w, p.Settings, 96)
	fmt.Fprintf(w, "\n%s\n", p.Try)
}
