// Package export writes a list of any length as it comes: as one JSON object, as JSON lines or as CSV.
//
// It touches the writer that it is given, a page at a time at the caller's pace. It promises a SHA-256 over
// the items' lines that whoever has the same items can compute: each item's JSON and a line feed. No cell of
// the CSV is taken for a formula by a spreadsheet.
package export

import (
	"bufio"
	"crypto/sha256"
	"encoding/csv"
	"encoding/hex"
	"hash"
	"io"
	"mime"
	"slices"
	"strconv"
	"strings"
)

// Formats by their media types.
const (
	JSON  = "application/json"
	Lines = "application/x-ndjson"
	CSV   = "text/csv"
)

// Negotiate picks a format by an Accept header: the one that weighs most, the first of equals, or JSON where
// anything will do.
func Negotiate(accept string) (format string, ok bool) {
	if strings.TrimSpace(accept) == "" {
		return JSON, true
	}
	most := 0.0
	for part := range strings.SplitSeq(accept, ",") {
		kind, parameters, _ := mime.ParseMediaType(part)
		weight := 1.0
		if q, given := parameters["q"]; given {
			weight, _ = strconv.ParseFloat(q, 64)
		}
		is := ""
		switch kind {
		case "*/*", "application/*", JSON:
			is = JSON
		case Lines, "application/jsonl", "application/jsonlines":
			is = Lines
		case CSV, "text/*":
			is = CSV
		}
		if is != "" && weight > most {
			format, most = is, weight
		}
	}
	return format, format != ""
}

// Writer writes one list.
type Writer struct {
	out    *bufio.Writer
	cells  *csv.Writer
	format string
	sum    hash.Hash
	items  int
}

// NewWriter begins a list. head is what a JSON object begins with, without its closing brace; columns are the
// CSV's first line.
func NewWriter(w io.Writer, format string, head []byte, columns []string) (*Writer, error) {
	e := &Writer{out: bufio.NewWriterSize(w, 32<<10), format: format, sum: sha256.New()}
	switch format {
	case JSON:
		e.out.Write(head)
		e.out.WriteString(`,"entries":[`)
	case CSV:
		e.cells = csv.NewWriter(e.out)
		return e, e.cells.Write(columns)
	}
	return e, nil
}

// Item writes one item: its JSON, or its cells.
func (e *Writer) Item(json []byte, cells func() []string) error {
	e.sum.Write(json)
	e.sum.Write([]byte{'\n'})
	e.items++
	if e.format == CSV {
		return e.Row(cells())
	}
	if e.format == JSON && e.items > 1 {
		e.out.WriteByte(',')
	}
	_, err := e.out.Write(json)
	if e.format == Lines {
		err = e.out.WriteByte('\n')
	}
	return err
}

// Row writes a row of a CSV that is no item, such as a sum; of the other formats, nothing.
func (e *Writer) Row(cells []string) error {
	if e.format != CSV {
		return nil
	}
	cells = slices.Clone(cells)
	for i, cell := range cells {
		if cell != "" && strings.ContainsRune("=+-@\t\r", rune(cell[0])) {
			cells[i] = "'" + cell
		}
	}
	return e.cells.Write(cells)
}

// Flush passes on what was written.
func (e *Writer) Flush() error {
	if e.cells != nil {
		e.cells.Flush()
		if err := e.cells.Error(); err != nil {
			return err
		}
	}
	return e.out.Flush()
}

// Sum is the SHA-256 of the items so far, in hex.
func (e *Writer) Sum() string { return hex.EncodeToString(e.sum.Sum(nil)) }

// Close ends the list. tail is what the JSON object ends with, without its braces; as JSON lines, head and
// tail are the last line, under name.
func (e *Writer) Close(name string, head, tail []byte) error {
	switch e.format {
	case JSON:
		e.out.WriteString(`],`)
		e.out.Write(tail)
		e.out.WriteString("}\n")
	case Lines:
		e.out.WriteString(`{"` + name + `":`)
		e.out.Write(head)
		e.out.WriteByte(',')
		e.out.Write(tail)
		e.out.WriteString("}}\n")
	}
	return e.Flush()
}
