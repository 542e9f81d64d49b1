//go:build !unix

package metric

// processorSeconds is not asked for here.
func processorSeconds() (seconds float64, ok bool) { return 0, false }
