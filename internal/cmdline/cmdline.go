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
var listJob = Job{"settings", "", "print each setting with its default and meaning, then exit"}

// Parse returns the job, empty for serving, and its argument. Where nothing is left to do, done is true and
// the program ends with the status.
func (p *Program) Parse(
	args []string, stdout, stderr io.Writer,
) (job, argument string, status int, done bool) {
	var named []string
	flags := flag.NewFlagSet(p.Name, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // what it has to say is said here
	for _, j := range append(p.Jobs, listJob) {
		take := func(value string) error {
			named, argument = append(named, j.Name), value
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
	}
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		p.help(stdout)
		return "", "", 0, true
	case err == nil && flags.NArg() > 0:
		err = fmt.Errorf("leave out %q: there are options and environment variables only", flags.Arg(0))
	case err == nil && len(named) > 1:
		err = fmt.Errorf("say -%s or -%s, not both: each is a job of its own", named[0], named[1])
	}
	switch {
	case err != nil:
		fmt.Fprintf(stderr, "%s: %v (%[1]s -h lists the options)\n", p.Name, err)
		return "", "", 2, true
	case len(named) == 0:
		return "", "", 0, false
	case named[0] == listJob.Name:
		env.Print(stdout, p.Settings)
		return "", "", 0, true
	}
	return named[0], argument, 0, false
}

// help is what fits a screen of 40 lines by 100 columns.
func (p *Program) help(w io.Writer) {
	fmt.Fprintf(w, "Usage:\n  %-28s %s\n", p.Name, p.Serves)
	for _, j := range append(p.Jobs, listJob) {
		fmt.Fprintf(w, "  %-28s %s\n", strings.TrimSpace(p.Name+" -"+j.Name+" "+j.Argument), j.Help)
	}
	fmt.Fprintf(w, "\nSettings are environment variables. These matter:\n")
	env.PrintMain(w, p.Settings)
	fmt.Fprintf(w, "\nThe others have defaults (%s -settings tells them):\n", p.Name)
	env.PrintNames(w, p.Settings, 96)
	fmt.Fprintf(w, "\n%s\n", p.Try)
}
