// What a request's body, query and headers say, as its handler asks for it. Whatever is not just as
// documented is refused, and no text costs more than its length.

package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"wallet/internal/jsontext"
)

// Fields is a request's JSON object, each member as its text.
type Fields map[string]Field

// Field is a JSON string, or another value as it was written.
type Field struct {
	Text   string
	Quoted bool
}

// Shape is what a body may hold.
type Shape struct {
	BytesMax int
	Fields   []string // strings or numbers, but for these:
	Flags    []string // true or false
	Objects  []string // objects, whose text is left to whoever asks for it
	List     string   // a list of objects of the shape Items, 1 to ItemsMax of them; empty: none is taken
	Items    *Shape
	ItemsMax int
}

// ReadFields reads a body that is one JSON object with no other fields than those of the shape, each at most
// once. A number stays the text it was: nothing passes through a float.
func ReadFields(r *http.Request, shape *Shape) (Fields, error) { return ReadList(r, shape, nil) }

// ReadList reads a body whose shape has a list, and hands over each of its objects in order, numbered from 0;
// item is used again. What is wrong with one is an *InItem, as is each's error, which ends the reading.
func ReadList(r *http.Request, shape *Shape, each func(n int, item Fields) error) (Fields, error) {
	kind := r.Header.Get("Content-Type")
	if kind != "application/json" { // mostly it is just that
		kind, _, _ = mime.ParseMediaType(kind)
	}
	if kind != "application/json" {
		return nil, refuse("content_type_unsupported",
			"Send Content-Type: application/json (curl --json does).")
	}
	body, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, int64(shape.BytesMax)))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return nil, refuse("body_too_large", "The body may have %d bytes.", shape.BytesMax)
	}
	if err != nil {
		return nil, refuse("body_malformed", "The body could not be read to its end.")
	}
	return parseBody(body, shape, each)
}

func parseBody(body []byte, shape *Shape, each func(n int, item Fields) error) (Fields, error) {
	found := make(Fields, len(shape.Fields))
	rest, err := parseFields(body, shape, found, each)
	if err == nil && len(trimSpace(rest)) > 0 {
		err = refuse("body_malformed", "Something follows the JSON object. Send one object only.")
	}
	if err != nil {
		return nil, err
	}
	return found, nil
}

// InItem is an error in one object of a body's list.
type InItem struct {
	List string // the list's name
	Item int    // from 0
	Err  error
}

func (e *InItem) Error() string { return fmt.Sprintf("%s[%d]: %v", e.List, e.Item, e.Err) }

// Unwrap is what is wrong with it.
func (e *InItem) Unwrap() error { return e.Err }

var errBodyMalformed = refuse("body_malformed", "Send one JSON object whose values are strings or numbers.")

// parseFields reads an object off the front of body, and adds its members to found.
func parseFields(body []byte, shape *Shape, found Fields, each func(n int, item Fields) error) (
	rest []byte, err error) {
	rest, ok := bytes.CutPrefix(trimSpace(body), []byte{'{'})
	if rest = trimSpace(rest); !ok || len(rest) == 0 {
		return nil, errBodyMalformed
	}
	for more := rest[0] != '}'; more; {
		var name, value Field
		if name, rest, ok = parseScalar(rest); !ok || !name.Quoted {
			return nil, errBodyMalformed
		}
		if !slices.Contains(shape.Fields, name.Text) {
			return nil, refuse("field_unknown", "This route has no field %.40q. It takes %s.",
				name.Text, strings.Join(shape.Fields, ", "))
		}
		if _, twice := found[name.Text]; twice {
			return nil, refuse("field_duplicate", "The field %q is there twice.", name.Text)
		}
		if rest, ok = bytes.CutPrefix(trimSpace(rest), []byte{':'}); !ok {
			return nil, errBodyMalformed
		}
		if name.Text == shape.List {
			if rest, err = parseList(trimSpace(rest), shape, each); err != nil {
				return nil, err
			}
			found[name.Text] = Field{}
			rest, more = bytes.CutPrefix(trimSpace(rest), []byte{','})
			rest = trimSpace(rest)
			continue
		}
		parse, kind := parseScalar, "a string or a number"
		if slices.Contains(shape.Flags, name.Text) {
			parse, kind = parseFlag, "true or false"
		} else if slices.Contains(shape.Objects, name.Text) {
			parse, kind = parseObject, "an object"
		}
		if value, rest, ok = parse(trimSpace(rest)); !ok {
			return nil, refuse("body_malformed", "The field %q must be %s.", name.Text, kind)
		}
		found[name.Text] = value
		rest, more = bytes.CutPrefix(trimSpace(rest), []byte{','})
		rest = trimSpace(rest)
	}
	if rest, ok = bytes.CutPrefix(rest, []byte{'}'}); !ok {
		return nil, errBodyMalformed
	}
	return rest, nil
}

// parseList reads a list of objects off the front of text.
func parseList(text []byte, shape *Shape, each func(n int, item Fields) error) (rest []byte, err error) {
	rest, ok := bytes.CutPrefix(text, []byte{'['})
	if !ok {
		return nil, refuse("body_malformed", "The field %q must be a list of objects.", shape.List)
	}
	item := make(Fields, len(shape.Items.Fields))
	for n, more := 0, true; more; n++ {
		rest = trimSpace(rest)
		if n == 0 && len(rest) > 0 && rest[0] == ']' || n == shape.ItemsMax {
			return nil, refuse("body_malformed", "The list %q has 1 to %d objects.", shape.List,
				shape.ItemsMax)
		}
		clear(item)
		if rest, err = parseFields(rest, shape.Items, item, nil); err == nil && each != nil {
			err = each(n, item)
		}
		if err != nil {
			return nil, &InItem{shape.List, n, err}
		}
		rest, more = bytes.CutPrefix(trimSpace(rest), []byte{','})
	}
	if rest, ok = bytes.CutPrefix(rest, []byte{']'}); !ok {
		return nil, errBodyMalformed
	}
	return rest, nil
}

// trimSpace cuts what JSON takes for white space off the front.
func trimSpace(text []byte) []byte { return bytes.TrimLeft(text, " \t\r\n") }

// parseScalar reads a JSON string or number (RFC 8259) off the front of text. What is more than plain ASCII
// is left to encoding/json: to have it read whole bodies, token by token, took as long as all of net/http's
// own work on a request.
func parseScalar(text []byte) (f Field, rest []byte, ok bool) {
	if len(text) > 0 && text[0] == '"' {
		plain := true
		for i := 1; i < len(text); i++ {
			switch c := text[i]; {
			case c == '"':
				f = Field{string(text[1:i]), true}
				if !plain {
					ok = json.Unmarshal(text[:i+1], &f.Text) == nil
				}
				return f, text[i+1:], plain || ok
			case c == '\\':
				i++ // whatever it escapes, it ends nothing
				plain = false
			case c < ' ' || c > '~':
				plain = false
			}
		}
		return f, nil, false
	}
	end := bytes.IndexFunc(text, func(c rune) bool { return !strings.ContainsRune("0123456789+-.eE", c) })
	if end <= 0 || !json.Valid(text[:end]) {
		return f, nil, false
	}
	return Field{string(text[:end]), false}, text[end:], true
}

// parseFlag reads true or false off the front of text.
func parseFlag(text []byte) (f Field, rest []byte, ok bool) {
	for _, word := range []string{"true", "false"} {
		if rest, ok = bytes.CutPrefix(text, []byte(word)); ok {
			return Field{Text: word}, rest, true
		}
	}
	return f, nil, false
}

// parseObject reads a JSON object off the front of text, whatever is in it.
func parseObject(text []byte) (f Field, rest []byte, ok bool) {
	if len(text) == 0 || text[0] != '{' {
		return f, nil, false
	}
	d := json.NewDecoder(bytes.NewReader(text))
	var raw json.RawMessage
	if d.Decode(&raw) != nil {
		return f, nil, false
	}
	return Field{Text: string(raw)}, text[d.InputOffset():], true
}

// ParseTexts reads an object of strings, such as a Shape's Objects, in the order of its members. It refuses
// (ok is false) whatever else is in it, a name that is there twice, and what is not UTF-8: a text comes out
// as it was sent or not at all.
func ParseTexts(object string) (names []string, values map[string]string, ok bool) {
	d := json.NewDecoder(strings.NewReader(object))
	values = make(map[string]string)
	if open, err := d.Token(); err != nil || open != json.Delim('{') || !utf8.ValidString(object) {
		return nil, nil, false
	}
	for d.More() {
		name, err := d.Token()
		key, isText := name.(string)
		if err != nil || !isText {
			return nil, nil, false
		}
		value, err := d.Token()
		text, isText := value.(string)
		_, twice := values[key]
		// A lone half of a surrogate pair has become this.
		if err != nil || !isText || twice || strings.ContainsRune(key+text, utf8.RuneError) {
			return nil, nil, false
		}
		names, values[key] = append(names, key), text
	}
	return names, values, true
}

// Key is a request's idempotency key, from the Idempotency-Key header or the body's idempotency_key; empty
// where neither has one. check is the service's own rule for a key's text.
func Key(r *http.Request, body Fields, check func(key string) (string, error)) (string, error) {
	values := r.Header.Values("Idempotency-Key")
	if len(values) == 0 {
		return KeyIn(body, check)
	}
	inBody, given := body["idempotency_key"]
	if given && !inBody.Quoted {
		return "", errKeyNoString
	}
	key, err := parseKeyHeader(values[0])
	if err == nil {
		key, err = check(key)
	}
	switch {
	case err != nil:
		return "", err
	case len(values) > 1:
		return "", refuse("idempotency_key_conflict", "Send one Idempotency-Key header.")
	case given && inBody.Text != key:
		return "", refuse("idempotency_key_conflict", "The Idempotency-Key header and the body's "+
			"\"idempotency_key\" differ. Send one, or the same twice.")
	}
	return key, nil
}

// KeyIn is the idempotency key that an object has, or empty.
func KeyIn(fields Fields, check func(key string) (string, error)) (string, error) {
	key, given := fields["idempotency_key"]
	switch {
	case !given:
		return "", nil
	case !key.Quoted:
		return "", errKeyNoString
	}
	return check(key.Text)
}

var errKeyNoString = refuse("idempotency_key_malformed", "The \"idempotency_key\" must be a string.")

// parseKeyHeader reads an Idempotency-Key header: bare, or quoted as a structured-field string (RFC 9651,
// 3.3.3).
func parseKeyHeader(value string) (string, error) {
	if !strings.HasPrefix(value, `"`) {
		return value, nil
	}
	var key strings.Builder
	for i := 1; i < len(value); i++ {
		switch c := value[i]; {
		case c == '"' && i == len(value)-1:
			return key.String(), nil
		case c == '\\' && i+1 < len(value) && (value[i+1] == '"' || value[i+1] == '\\'):
			i++
			key.WriteByte(value[i])
		case c == '"' || c == '\\':
			return "", refuse("idempotency_key_malformed",
				"A quoted Idempotency-Key ends at its second quote, and escapes only \\\" and \\\\.")
		default:
			key.WriteByte(c)
		}
	}
	return "", refuse("idempotency_key_malformed", "A quoted Idempotency-Key ends with a quote.")
}

// Query is a request's query parameters, each at most once, but for those that are empty.
type Query map[string]string

// ReadQuery reads a query string with no other parameters than those allowed.
func ReadQuery(r *http.Request, allowed ...string) (Query, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, refuse("parameter_malformed", "The query string is not well-formed.")
	}
	q := make(Query)
	for name, v := range values {
		if !slices.Contains(allowed, name) {
			return nil, refuse("parameter_malformed", "This route has no parameter %.40q. It takes %s.",
				name, strings.Join(allowed, ", "))
		}
		if len(v) > 1 {
			return nil, refuse("parameter_malformed", "The parameter %q is there twice.", name)
		}
		if v[0] != "" { // else it is as if left out
			q[name] = v[0]
		}
	}
	return q, nil
}

// Integer is a parameter that is a whole number from least to most, or fallback where it is empty.
func (q Query) Integer(name string, fallback, least, most int64) (int64, error) {
	if q[name] == "" {
		return fallback, nil
	}
	n, err := strconv.ParseInt(q[name], 10, 64)
	if err != nil || n < least || n > most {
		return 0, refuse("parameter_malformed", "%s is a whole number from %d to %d.", name, least, most)
	}
	return n, nil
}

// Time is a parameter that is a time (RFC 3339), or fallback where it is empty.
func (q Query) Time(name string, fallback time.Time) (time.Time, error) {
	if q[name] == "" {
		return fallback, nil
	}
	at, err := time.Parse(time.RFC3339, q[name])
	if err != nil || at.Year() < 1 || at.Year() > 9999 {
		return at, refuse("parameter_malformed",
			"%s is an RFC 3339 time, such as 2026-01-02T03:04:05Z (a + must be sent as %%2B).", name)
	}
	return at, nil
}

// Traceparent is a request's W3C trace context (https://www.w3.org/TR/trace-context/#traceparent-header), or
// empty.
func Traceparent(h http.Header) string {
	v := h.Get("Traceparent")
	if len(v) != 55 || v[2] != '-' || v[35] != '-' || v[52] != '-' || v[:2] == "ff" ||
		strings.Trim(v, "0123456789abcdef-") != "" || strings.Trim(v[3:35], "0") == "" ||
		strings.Trim(v[36:52], "0") == "" || strings.Count(v, "-") != 3 {
		return ""
	}
	return v
}

// traceID is the part of a Traceparent that all of a trace's spans share, in the form that log tools know.
// The rest of it is the caller's span, which none of our lines is about.
func traceID(h http.Header) string {
	if v := Traceparent(h); v != "" {
		return v[3:35]
	}
	return ""
}

// Printable says whether all of a text is visible, or a space between.
func Printable(text string) bool {
	return utf8.ValidString(text) && !strings.ContainsFunc(text, func(c rune) bool {
		return !unicode.IsPrint(c) || c == utf8.RuneError
	})
}

// Canonical is the one form of an object of strings: its members by name, without white space; empty where it
// has none. It refuses (ok is false) what ParseTexts does, a member without a name, and more than so many.
func Canonical(object string, members int) (text string, ok bool) {
	names, values, ok := ParseTexts(object)
	if !ok || len(names) > members || slices.Contains(names, "") {
		return "", false
	}
	if len(names) == 0 {
		return "", true
	}
	slices.Sort(names)
	dst := []byte{'{'}
	for i, name := range names {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(jsontext.AppendText(dst, name), ':') // a client's, so that it may need escapes
		dst = jsontext.AppendText(dst, values[name])
	}
	return string(append(dst, '}')), true
}

// Span reads a length of time such as 15m: a whole number of s, m, h or d, up to most.
func Span(text string, most time.Duration) (span time.Duration, ok bool) {
	if len(text) < 2 || len(text) > 10 || text[0] == '0' {
		return 0, false
	}
	unit := map[byte]time.Duration{'s': time.Second, 'm': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour}
	n, err := strconv.ParseUint(text[:len(text)-1], 10, 32)
	each := unit[text[len(text)-1]]
	if err != nil || each == 0 || n > uint64(most/each) {
		return 0, false
	}
	return time.Duration(n) * each, true
}
