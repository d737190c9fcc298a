package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"text/tabwriter"

	"farkeep/pusher/travel"
	"farkeep/shared/hint"
	"farkeep/shared/identity"
	"farkeep/shared/site"
	"farkeep/shared/sshverb"
	"farkeep/shared/usage"

	"golang.org/x/crypto/ssh"
)

// travelStatus is the list of one appliance, as JSON.
type travelStatus struct {
	Appliance string        `json:"appliance"`
	Ready     bool          `json:"ready"`
	Items     []travel.Item `json:"items"`
}

// readyToTravel is status --ready-to-travel: of the appliances with these names,
// or of all.
func readyToTravel(ctx context.Context, env *Env, at *places, names []string, asJSON bool) error {
	me, err := at.readSelf()
	if err != nil {
		return err
	}
	if len(me.site.Appliances) == 0 {
		return usage.Errorf("%s has no appliance", at.site)
	}
	signer, err := at.readIdentity(me.site)
	if err != nil {
		return err
	}
	targets, err := at.targets(me, names, at.memory(), env, at.logger(env.Stderr))
	if err != nil {
		return err
	}
	servers := tryKeyServers(ctx, me.site, signer)
	here, err := ownNetworks()
	if err != nil {
		return err
	}
	var all []travelStatus
	for _, answer := range ask(ctx, targets) {
		a, ok := me.site.Appliance(answer.Name)
		if !ok {
			continue // a folder, which travels by itself
		}
		items := travel.List(travel.Facts{
			Site: me.site, Appliance: a, Status: answer.Status, Silence: errors.New(answer.Error),
			KeyServers: servers, Here: here, Now: env.Now(),
		})
		all = append(all, travelStatus{a.Name, travel.Ready(items), items})
	}
	if asJSON {
		enc := json.NewEncoder(env.Stdout)
		enc.SetIndent("", "\t")
		err = enc.Encode(all)
	} else {
		err = showTravel(env, all)
	}
	if err != nil {
		return err
	}
	missing := 0
	for _, s := range all {
		for _, i := range s.Items {
			if !i.OK {
				missing++
			}
		}
	}
	if missing > 0 {
		return hint.Exit(hint.ExitPartial, fmt.Errorf("not ready to travel: %d not ok", missing))
	}
	return nil
}

func showTravel(env *Env, all []travelStatus) error {
	for n, s := range all {
		if n > 0 {
			fmt.Fprintln(env.Stdout)
		}
		fmt.Fprintln(env.Stdout, s.Appliance)
		w := tabwriter.NewWriter(env.Stdout, 0, 8, 2, ' ', 0)
		for _, i := range s.Items {
			mark := "ok"
			if !i.OK {
				mark = "NOT OK"
			}
			fmt.Fprintf(w, "  %s\t%s\t%s\n", mark, i.Name, i.Says)
			if i.Do != "" {
				fmt.Fprintf(w, "  \t\t  do: %s\n", i.Do)
			}
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// tryKeyServers connects to every key server and looks at its host key. It knows
// appliances only, so that it turns us away is what a key server that works does.
func tryKeyServers(ctx context.Context, s *site.Site, me ssh.Signer) map[string]error {
	ctx, cancel := context.WithTimeout(ctx, statusWait)
	defer cancel()
	var mu sync.Mutex
	answers := map[string]error{}
	var all sync.WaitGroup
	for _, k := range s.KeyServers {
		all.Go(func() {
			err := tryKeyServer(ctx, k, me)
			mu.Lock()
			defer mu.Unlock()
			answers[k.Name] = err
		})
	}
	all.Wait()
	return answers
}

func tryKeyServer(ctx context.Context, k site.KeyServer, me ssh.Signer) error {
	key, err := identity.ParsePublic(k.HostKey)
	if err != nil {
		return fmt.Errorf("its host key in site.toml: %w", err)
	}
	c, err := sshverb.Dial(ctx, sshverb.Peer{Address: k.Address, User: "farkeep", Identity: me, HostKey: key})
	if err == nil {
		return c.Close()
	}
	if hint.Code(err) == hint.ExitRefused && !errors.Is(err, sshverb.ErrHostKey) {
		return nil
	}
	return err
}

// ownNetworks are the networks that this machine is in.
func ownNetworks() ([]netip.Prefix, error) {
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("this machine's networks: %w", err)
	}
	var all []netip.Prefix
	for _, a := range addresses {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			all = append(all, p)
		}
	}
	return all, nil
}
