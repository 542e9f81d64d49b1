package metric

// States writes one gauge for each of the states that something may be in: 1 for the present one, else 0.
func (w *Writer) States(name, help, present string, states ...string) {
	var samples []Sample
	for _, state := range states {
		is := 0.0
		if state == present {
			is = 1
		}
		samples = append(samples, Sample{Labels: `state="` + state + `"`, Value: is})
	}
	w.Gauges(name, help, samples...)
}
