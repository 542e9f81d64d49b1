// What to do about the faults that a first start meets, told beside the error.

package main

import (
	"slices"
	"strings"
)

// advices are words of errors, or of the ends of logs in them, and what to do. The first is told whose words
// are all there.
var advices = []struct {
	words  []string
	advice string
}{
	{[]string{"no space left on device"}, "a disk is full: free some space, or keep the stack elsewhere " +
		"with -data FOLDER (downloads are in the user's cache folder, what Go compiles in GOCACHE)"},
	{[]string{"disk quota exceeded"}, "a quota is used up: free some space, or keep the stack elsewhere " +
		"with -data FOLDER"},
	{[]string{"requires go >= "}, "install a newer Go (https://go.dev/dl), or let yours fetch it: " +
		"go env -u GOTOOLCHAIN"},
	{[]string{"go-build", "dial tcp"}, "compiling needs the network once, for Go's modules: go online, or " +
		"set GOPROXY to a mirror that can be reached"},
	{[]string{"no download: "}, "the first start needs the network: go online (HTTPS_PROXY is obeyed), or " +
		"install Postgres 15 or later, or name the folder of its programs with -postgres FOLDER"},
	{[]string{"maven failed"}, "fetching Apache Kafka needs the network once (Maven's settings.xml names a " +
		"proxy); -kafka embedded needs none"},
	{[]string{"ended by itself", "address already in use"}, "another program took a port between our look " +
		"and the server's: start again"},
}

// advise is empty where there is nothing to add.
func advise(err error) string {
	text := strings.ToLower(err.Error())
	for _, a := range advices {
		if !slices.ContainsFunc(a.words, func(word string) bool { return !strings.Contains(text, word) }) {
			return a.advice
		}
	}
	return ""
}
