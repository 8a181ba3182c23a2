package main

import (
	"fmt"
	"io"
	"time"

	"perceptd/cmd/perceptctl/term"
)

// The rules of what people see:
//
//   - Standard output carries the answer and nothing else; errors and hints go to standard error.
//   - Text is lower-case facts without a full stop. An error says what is so, its hint what to do.
//     What explains, as `explain` does, is whole sentences.
//   - Times of day are those of the device's time zone.
//   - What needs a person comes first; a simulated back end is said before all else.
//   - Text for people fits the terminal, or 80 columns where there is none. What is too long is cut in
//     its middle with "…" in tables, and stays whole in sentences. Whoever needs all of it asks for --json.
//   - Colour only repeats what the words say, and only on a terminal, and not with $NO_COLOR.
//   - Control characters from outside never reach the terminal: package term replaces them.
//   - A token's text is printed by `token`, which was asked for it, and by nothing else.

// screen is what a stream of output can show, and the time zone that times are shown in.
type screen struct {
	term.Screen
	zone *time.Location // nil: UTC
}

func (a *app) screen(o *term.Output) screen { return screen{o.Screen(), a.zone()} }

// print writes the answer.
func (a *app) print(text string) error {
	_, err := io.WriteString(a.stdout, text)
	return err
}

// printJSON writes the answer for programs: one indented document.
func (a *app) printJSON(answer any) error { return a.stdout.JSON(answer, "  ") }

// printJSONLine writes one of several answers for programs: a line each.
func (a *app) printJSONLine(answer any) error { return a.stdout.JSON(answer, "") }

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
