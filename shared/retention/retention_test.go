package retention_test

import (
	"testing"
	"time"

	"farkeep/shared/retention"
)

const day = 24 * time.Hour

func at(text string) time.Time {
	t, err := time.Parse("2006-01-02 15:04", text)
	if err != nil {
		panic(err)
	}
	return t
}

// TestBorgsExample keeps what the example of borg prune's manual keeps: an
// archive of every day of a year, --keep-daily 14 --keep-monthly 6 --keep-yearly 1.
func TestBorgsExample(t *testing.T) {
	now := at("2016-01-01 12:00")
	var items []retention.Item
	for d := at("2015-01-01 12:00"); !d.After(now); d = d.Add(day) {
		items = append(items, retention.Item{Name: d.Format("2006-01-02"), Sequence: int64(len(items) + 1), Committed: d})
	}
	r := retention.Rules{Policy: retention.Policy{Daily: 14, Monthly: 6, Yearly: 1}, PerDay: 1000}
	got := map[string]string{}
	for _, d := range retention.Plan(now, r, items) {
		if d.Keep {
			got[d.Name] = d.Why
		}
	}
	for name, why := range map[string]string{
		"2016-01-01": "daily #1", "2015-12-31": "daily #2", "2015-12-19": "daily #14",
		"2015-11-30": "monthly #1", "2015-06-30": "monthly #6", "2015-01-01": "yearly[oldest] #1",
	} {
		if got[name] != why {
			t.Errorf("%s is kept as %q; want %q", name, got[name], why)
		}
	}
	if len(got) != 14+6+1 {
		t.Errorf("%d are kept: %v; want 21", len(got), got)
	}
}
