package borgconfig

import (
	"strings"
	"testing"
)

const someID = "57d6c1d52ce76a836b532b0e42e677dec6af9fca3673db511279358828a21ed6"

func TestParse(t *testing.T) {
	key := "key = hqlhbGdvcml0\n\tkZGF0YdoA3\n\tkaGFzaNoAIB\n"
	for _, c := range []struct {
		name, text string
		want       Config
		err        string
	}{
		{name: "plain", text: "[repository]\nversion = 1\nid = " + someID + "\n", want: Config{someID, 1}},
		{name: "with key", text: "[repository]\nversion = 1\n" + key + "id = " + someID + "\n", want: Config{someID, 1}},
		{name: "capitals, colon, comment, CRLF", text: "# c\r\n[repository]\r\nVersion: 1\r\nID: " + strings.ToUpper(someID) + "\r\n", want: Config{someID, 1}},
		{name: "other section first", text: "[other]\nid = x\n[repository]\nversion = 1\nid = " + someID + "\n", want: Config{someID, 1}},
		{name: "git", text: "[core]\n\tbare = false\n", err: "no [repository]"},
		{name: "no id", text: "[repository]\nversion = 1\n", err: "64 hexadecimal"},
		{name: "long id", text: "[repository]\nversion = 1\nid = " + someID + "00\n", err: "64 hexadecimal"},
		{name: "odd version", text: "[repository]\nversion = 1x\nid = " + someID + "\n", err: "is no number"},
		{name: "twice", text: "[repository]\nversion = 1\nid = " + someID + "\nid = " + someID + "\n", err: "set twice"},
		{name: "no setting", text: "[repository]\nversion\n", err: "no setting"},
		{name: "huge", text: strings.Repeat("#", MaxSize+1), err: "larger"},
	} {
		got, err := Parse([]byte(c.text))
		if c.err == "" {
			if err != nil || got != c.want {
				t.Errorf("%s: %+v %v", c.name, got, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("[repository]\nversion = 1\nid = " + someID + "\nkey = a\n\tb\n"))
	f.Add([]byte("[repository]\r\nid:" + someID))
	f.Add([]byte("["))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse(text)
		if err == nil && (len(c.ID) != 64 || strings.Trim(c.ID, "0123456789abcdef") != "") {
			t.Errorf("id %q", c.ID)
		}
	})
}
