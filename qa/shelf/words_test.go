package shelf

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"

	"github.com/ledge-storage/ledge/firmware/control"
	"github.com/ledge-storage/ledge/host/api"
)

// TestSameWords: what the shelf says and what the operator's command understands are the same fields. host does not
// import firmware, so nothing else holds it.
func TestSameWords(t *testing.T) {
	for _, c := range []struct{ says, hears any }{
		{new(control.PoolInfo), new(api.PoolInfo)}, {new(control.ArrayInfo), new(api.ArrayInfo)}, {new(control.DriveList), new(api.DriveList)},
		{new(control.LUNInfo), new(api.LUNInfo)}, {new(control.LUN), new(api.ShelfLUN)}, {new(control.Task), new(api.Task)},
	} {
		fill(reflect.ValueOf(c.says).Elem())
		said, err := json.Marshal(c.says)
		if err != nil {
			t.Fatal(err)
		}
		dec := json.NewDecoder(bytes.NewReader(said))
		dec.DisallowUnknownFields()
		if err := dec.Decode(c.hears); err != nil {
			t.Errorf("%T: %v", c.says, err)
			continue
		}
		if heard, err := json.Marshal(c.hears); err != nil || !bytes.Equal(said, heard) {
			t.Errorf("%T: %v\nsaid  %s\nheard %s", c.says, err, said, heard)
		}
	}
}

// fill sets every field to something that is not zero.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				fill(v.Field(i))
			}
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint, reflect.Uint32, reflect.Uint64:
		v.SetUint(7)
	}
}
