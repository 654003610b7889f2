//go:build unix

// The results as a table and as JSON.

package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
)

type results struct {
	Date   string `json:"date"`
	CPU    string `json:"cpu"`
	CPUs   int    `json:"cpus"`
	Go     string `json:"go"`
	Rounds int    `json:"rounds"`
	Rows   []*row `json:"rows"`
}

// row is one measure of one scenario, with one value per round.
type row struct {
	Scenario string    `json:"scenario"`
	Measure  string    `json:"measure"`
	Snippet  []float64 `json:"snippet"`
	Herald   []float64 `json:"herald"`
}

// add adds the measures of one round. isBase says that they are from the server that serves as the
// baseline.
func (r *results) add(scenario string, isBase bool, measures map[string]float64) {
	for _, measure := range slices.Sorted(maps.Keys(measures)) {
		value := measures[measure]
		at := slices.IndexFunc(r.Rows, func(row *row) bool { return row.Scenario == scenario && row.Measure == measure })
		if at < 0 {
			at = len(r.Rows)
			r.Rows = append(r.Rows, &row{Scenario: scenario, Measure: measure})
		}
		if isBase {
			r.Rows[at].Snippet = append(r.Rows[at].Snippet, value)
		} else {
			r.Rows[at].Herald = append(r.Rows[at].Herald, value)
		}
	}
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// print writes a Markdown table. The ratio is Herald's value divided by the snippet's.
func (r *results) print(w io.Writer) {
	fmt.Fprintf(w, "%s, %d CPUs (%s), %s, median of %d rounds\n\n", r.Date, r.CPUs, r.CPU, r.Go, r.Rounds)
	fmt.Fprintln(w, "| load | measure | snippet | Herald | ratio |")
	fmt.Fprintln(w, "|---|---|--:|--:|--:|")
	last := ""
	for _, row := range r.Rows {
		label := row.Scenario
		if label == last {
			label = ""
		}
		last = row.Scenario
		snippet, herald := median(row.Snippet), median(row.Herald)
		ratio := "–"
		if snippet > 0 {
			ratio = fmt.Sprintf("%.2f", herald/snippet)
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s |\n", label, row.Measure, number(snippet), number(herald), ratio)
	}
}

func number(v float64) string {
	switch {
	case v >= 1000:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
