package localcall

import (
	"bytes"
	"encoding/json"
	"testing"
)

// Whatever is accepted as a request is one value that says the same again.
func FuzzRequest(f *testing.F) {
	for _, seed := range []string{`{"verb":"wake"}`, `{"verb":"offer","args":{"a":[1,2]}}`, `{"verb":"x","uid":0}`, `{} {}`, `null`, ``} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		var req Request
		if strict(line, &req) != nil {
			return
		}
		if req.UID != 0 {
			t.Errorf("%q set the caller", line)
		}
		out, err := json.Marshal(req)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		var again Request
		if err := strict(out, &again); err != nil || again.Verb != req.Verb {
			t.Errorf("%q became %q: %v", line, out, err)
		}
		if bytes.ContainsRune(out, '\n') {
			t.Errorf("%q became more than a line", line)
		}
	})
}
