package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Strict decodes one JSON object into v, refusing unknown fields, duplicates of case, wrong types and trailing
// data, in words that name the field or the position.
func Strict(body []byte, v any) error {
	if trimmed := bytes.TrimSpace(body); len(trimmed) == 0 || trimmed[0] != '{' {
		return errors.New("a JSON object is required: {…}")
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return explain(err, body)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the JSON object")
	}
	return nil
}

func explain(err error, body []byte) error {
	var syntax *json.SyntaxError
	var typ *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		line, col := position(body, syntax.Offset)
		return fmt.Errorf("line %d column %d: %w", line, col, err)
	case errors.As(err, &typ):
		field := typ.Field
		if field == "" {
			field = "the object"
		}
		return fmt.Errorf("field %q: got a JSON %s, want %s", field, typ.Value, kindName(typ.Type.String()))
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("the JSON object ends too early")
	}
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		return fmt.Errorf("unknown field %s", name)
	}
	return err
}

// position turns a byte offset into line and column, both from 1.
func position(body []byte, off int64) (line, col int) {
	off = min(max(off, 1), int64(len(body)))
	before := body[:off]
	line = 1 + bytes.Count(before[:len(before)-1], []byte("\n"))
	col = len(before) - 1 - bytes.LastIndexByte(before[:len(before)-1], '\n')
	return line, col
}

// kindName says a Go type in words of JSON.
func kindName(t string) string {
	switch {
	case strings.HasPrefix(t, "[]"):
		return "a list"
	case strings.HasPrefix(t, "map"), strings.Contains(t, "."):
		return "an object"
	case strings.HasPrefix(t, "int"):
		return "a whole number"
	case strings.HasPrefix(t, "uint"):
		return "a whole number, not negative"
	case t == "bool":
		return "true or false"
	}
	return "a " + t
}
