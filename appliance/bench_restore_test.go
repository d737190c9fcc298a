package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// BenchmarkRestore brings a generation back: with the pusher, with OpenSSH's sftp
// out of the same receiver, with OpenSSH's sftp and with rsync out of OpenSSH's
// server. Once as quick as the machine is, and once over a line on which every
// byte takes 20 ms: what a file costs in round trips shows only there.
func BenchmarkRestore(b *testing.B) {
	for _, data := range []struct {
		name string
		make func(b *testing.B, dir string) int64
		late time.Duration
	}{
		{"segments", makeSegments, 0},
		{"small", makeSmall, 0},
		{"segments-20ms", makeSegments, 20 * time.Millisecond},
		{"small-20ms", makeSmall, 20 * time.Millisecond},
	} {
		b.Run(data.name, func(b *testing.B) {
			dir := benchDir(b)
			source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
			mountTmpfs(b, source, "3g")
			mountTmpfs(b, target, "3g")
			size := data.make(b, source)
			want := sums(b, source)
			a, sshd := benchmarkAppliance(b, dir), startSSHD(b, dir)
			site := a.site(b, filepath.Join(dir, "site"), "photos", source)
			site.push(b, "new")
			generation := site.generation(b, 1)

			// From here on every contender comes by a line of its own.
			ours, theirs := late(b, a.port, data.late), late(b, sshd.port(b), data.late)
			to := filepath.Join(target, "copy")
			fetch := func(in string, cmd *exec.Cmd, servers ...int) cost {
				c, _ := measure(b, cmd, servers...)
				sameFiles(b, want, filepath.Join(to, in))
				must(b, os.RemoveAll(to))
				return c
			}
			sftp := func(options []string, from, in string, servers ...int) cost {
				must(b, os.MkdirAll(to, 0o700))
				batch := filepath.Join(dir, "batch")
				must(b, os.WriteFile(batch, fmt.Appendf(nil, "get -R %s %s\n", from, to), 0o600))
				return fetch(in, exec.Command("sftp", append(options, "-q", "-b", batch, "bench")...), servers...)
			}
			own := filepath.Join(dir, "own_config")
			must(b, os.WriteFile(own, fmt.Appendf(nil, "Host bench\n  HostName 127.0.0.1\n  Port %d\n  User farkeep\n  IdentityFile %s\n  IdentitiesOnly yes\n  BatchMode yes\n  LogLevel ERROR\n  UserKnownHostsFile %s\n",
				ours, a.restore, knownHosts(b, dir, ours, a.hostKey)), 0o600))
			stock := sshd.config
			if data.late > 0 {
				stock = filepath.Join(dir, "late_config")
				text, err := os.ReadFile(sshd.config)
				must(b, err)
				must(b, os.WriteFile(stock, []byte(strings.ReplaceAll(string(text), fmt.Sprintf("Port %d", sshd.port(b)), fmt.Sprintf("Port %d\n  HostKeyAlias [127.0.0.1]:%d", theirs, sshd.port(b)))), 0o600))
			}
			compare(b, size, []contender{
				{"rsync", func(int) cost {
					must(b, os.MkdirAll(to, 0o700))
					return fetch("", exec.Command("rsync", "-a", "--rsh=ssh -F "+stock, "bench:"+source+"/", to+"/"), sshd.pid)
				}},
				{"sftp", func(int) cost { return sftp([]string{"-F", stock}, source, "source", sshd.pid) }},
				{"sftp-receiver", func(int) cost {
					return sftp([]string{"-F", own}, "/photos/"+filepath.Base(generation)+"/files", "files", a.parts...)
				}},
				{"farkeep", func(int) cost {
					cmd := exec.Command(a.pusher, "restore", "attic", "photos", "latest", "--to", to, "--site", filepath.Join(site.dir, "site.toml"),
						"--restore-key", a.restore, "--address", fmt.Sprintf("127.0.0.1:%d", ours))
					return fetch("", cmd, a.parts...)
				}},
			})
		})
	}
}

func knownHosts(b *testing.B, dir string, port int, key string) string {
	b.Helper()
	path := filepath.Join(dir, "own_known_hosts")
	must(b, os.WriteFile(path, fmt.Appendf(nil, "[127.0.0.1]:%d %s\n", port, key), 0o600))
	return path
}

// port is where sshd listens, as its client's configuration says.
func (s *benchSSHD) port(b *testing.B) (port int) {
	b.Helper()
	text, err := os.ReadFile(s.config)
	must(b, err)
	_, rest, _ := strings.Cut(string(text), "  Port ")
	_, err = fmt.Sscan(rest, &port)
	must(b, err)
	return port
}

// late returns a port that leads to another one, later by that much each way,
// with no limit on how much is on its way.
func late(b *testing.B, port int, by time.Duration) int {
	b.Helper()
	if by == 0 {
		return port
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(b, err)
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if err != nil {
				near.Close()
				continue
			}
			go carry(near, far, by)
			go carry(far, near, by)
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

func carry(from, to net.Conn, by time.Duration) {
	type piece struct {
		data []byte
		due  time.Time
	}
	way := make(chan piece, 4096)
	go func() {
		defer close(way)
		for {
			buf := make([]byte, 32<<10)
			n, err := from.Read(buf)
			if n > 0 {
				way <- piece{buf[:n], time.Now().Add(by)}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range way {
		time.Sleep(time.Until(p.due))
		if _, err := to.Write(p.data); err != nil {
			from.Close()
		}
	}
	if c, ok := to.(interface{ CloseWrite() error }); ok {
		c.CloseWrite()
	}
	io.Copy(io.Discard, from)
	to.Close()
}
