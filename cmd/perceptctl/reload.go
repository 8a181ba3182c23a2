package main

import (
	"context"

	"github.com/spf13/cobra"

	"perceptd/agent/api"
	"perceptd/cmd/perceptctl/term"
)

func (a *app) reloadCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "make perceptd read its configuration again",
		Long: `Make perceptd read its configuration again and print what changed, a line each,
and warnings of what is in force and not as it should be. A bad configuration changes nothing: its faults are told ` +
			`here and in the status.`,
		Args: cobra.NoArgs,
		RunE: a.verb(a.reload),
	}
}

func (a *app) reload(ctx context.Context) error {
	ctx, cancel := a.withTimeout(ctx)
	defer cancel()
	answer, err := a.client.Reload(ctx)
	if err != nil {
		return err
	}
	return a.print(a.screen(a.stdout).reloaded(answer))
}

// reloaded says what a reload changed.
func (s screen) reloaded(answer api.ReloadResponse) string {
	text := ""
	if len(answer.Changes) == 0 {
		text = "read again, nothing changed\n"
	}
	for _, change := range answer.Changes {
		text += s.Paragraph("", change, term.Plain)
	}
	for _, what := range answer.Warnings {
		text += s.Paragraph("warning: ", what, term.Warning)
	}
	return text
}
