package agent

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"github.com/ledge-storage/ledge/host/api"
)

// object reads a JSON object strictly: every field is taken by name, and what is wrong is collected as
// "field: value: what is allowed", all of it, so that a file is mended in one go.
type object struct {
	path   string // "" or "shelf."
	hidden bool   // its values are secrets: errors do not show them
	fields map[string]json.RawMessage
	known  []string
	errs   *[]error
}

func parseObject(b []byte, path string, errs *[]error) *object {
	return (&object{path: path, errs: errs}).parse(b)
}

func (o *object) parse(b []byte) *object {
	o.fields = map[string]json.RawMessage{}
	d := json.NewDecoder(bytes.NewReader(b))
	t, err := d.Token()
	if err != nil || t != json.Delim('{') {
		o.fail("", b, "a JSON object: {…}")
		return o
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			break
		}
		var v json.RawMessage
		if err := d.Decode(&v); err != nil {
			break
		}
		if _, twice := o.fields[key.(string)]; twice {
			o.fail(key.(string), v, "only once")
		}
		o.fields[key.(string)] = v
	}
	return o
}

// fail notes an error. value is shown as it is in the file, cut.
func (o *object) fail(field string, value []byte, want string) {
	name := strings.TrimSuffix(o.path+field, ".")
	if name == "" {
		name = "the whole file"
	}
	v := string(bytes.TrimSpace(value))
	if o.hidden {
		v = "not shown"
	}
	if len(v) > 80 {
		v = v[:80] + "…"
	}
	*o.errs = append(*o.errs, fmt.Errorf("field %q: value %s: want %s", name, v, want))
}

func (o *object) missing(field, want string) {
	*o.errs = append(*o.errs, fmt.Errorf("field %q: missing: want %s", o.path+field, want))
}

// take returns a field's raw value; ok is false where it is absent. Null is a value like any other wrong one.
func (o *object) take(field string) (v json.RawMessage, ok bool) {
	o.known = append(o.known, field)
	v, ok = o.fields[field]
	return v, ok
}

// text reads a string. check returns "" for a value that is allowed.
func (o *object) text(field string, p *string, want string, allowed func(string) bool) {
	v, ok := o.take(field)
	if !ok {
		if !allowed(*p) {
			o.missing(field, want)
		}
		return
	}
	var s string
	if !isString(v) || json.Unmarshal(v, &s) != nil || !allowed(s) {
		o.fail(field, v, want)
		return
	}
	*p = s
}

func isString(v json.RawMessage) bool { return len(v) > 0 && v[0] == '"' }

// size reads bytes: a whole number, or a string such as "16GiB".
func (o *object) size(field string, p *int64, lo, hi, step int64) {
	want := fmt.Sprintf("a size from %s to %s", api.FormatSize(lo), api.FormatSize(hi))
	if step > 1 {
		want += ", a multiple of " + api.FormatSize(step)
	}
	v, ok := o.take(field)
	if !ok {
		return
	}
	s := string(v)
	if isString(v) && json.Unmarshal(v, &s) != nil {
		o.fail(field, v, want)
		return
	}
	n, err := api.ParseSize(s)
	if err != nil || n < lo || n > hi || n%step != 0 {
		o.fail(field, v, want)
		return
	}
	*p = n
}

// number reads a whole number; want says of what.
func (o *object) number(field string, p *int64, lo, hi int64, want string) {
	v, ok := o.take(field)
	if !ok {
		return
	}
	var n int64
	if json.Unmarshal(v, &n) != nil || string(v) == "null" || n < lo || n > hi {
		o.fail(field, v, fmt.Sprintf("%d to %d %s", lo, hi, want))
		return
	}
	*p = n
}

func (o *object) list(field string, p *[]string, want string, allowed func(string) bool, atMost int) {
	v, ok := o.take(field)
	if !ok {
		o.missing(field, want)
		return
	}
	var l []json.RawMessage
	if json.Unmarshal(v, &l) != nil || len(l) == 0 || len(l) > atMost {
		o.fail(field, v, want)
		return
	}
	for i, e := range l {
		var s string
		if !isString(e) || json.Unmarshal(e, &s) != nil || !allowed(s) {
			o.fail(fmt.Sprintf("%s[%d]", field, i), e, want)
			continue
		}
		*p = append(*p, s)
	}
}

// sub returns a nested object; nil where it is absent or, which is noted, something else.
func (o *object) sub(field string) (s *object, present bool) {
	v, ok := o.take(field)
	if !ok {
		return nil, false
	}
	before := len(*o.errs)
	if s = parseObject(v, o.path+field+".", o.errs); len(*o.errs) > before {
		s = nil
	}
	return s, true
}

// end refuses fields that nobody took.
func (o *object) end() {
	for k, v := range o.fields {
		if !slices.Contains(o.known, k) {
			o.fail(k, v, "no such field; known here are "+strings.Join(o.known, ", "))
		}
	}
}

// syntax checks that b is one JSON value, and says where it is not.
func syntax(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	var v json.RawMessage
	if err := d.Decode(&v); err != nil {
		off := int64(len(b))
		if s, ok := err.(*json.SyntaxError); ok {
			off = min(s.Offset, off)
		}
		line := 1 + bytes.Count(b[:off], []byte("\n"))
		return fmt.Errorf("line %d: %w", line, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("line %d: something follows the JSON object", 1+bytes.Count(b[:d.InputOffset()], []byte("\n")))
	}
	return nil
}

func (o *object) flag(field string, p *bool) {
	if v, ok := o.take(field); ok && (json.Unmarshal(v, p) != nil || string(v) == "null") {
		o.fail(field, v, "true or false")
	}
}

// readAll reads a request's body within the limit.
func readAll(r *http.Request) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r.Body, api.MaxBody+1))
	if err != nil {
		return nil, refuse(http.StatusBadRequest, "", "the body cannot be read: %v", err)
	}
	if len(b) > api.MaxBody {
		return nil, refuse(http.StatusRequestEntityTooLarge, "", "the body has more than %d bytes", api.MaxBody)
	}
	return b, nil
}
