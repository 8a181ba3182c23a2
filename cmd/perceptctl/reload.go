package main

import (
	"context"

	"github.com/spf13/cobra"
)

func (a *app) reloadCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "make perceptd read its configuration again",
		Long: `Make perceptd read its configuration again and print what changed, a line each.
A bad configuration changes nothing: its faults are told here and in the status.`,
		Args: cobra.NoArgs,
		RunE: a.verb(a.reload),
	}
}

func (a *app) reload(ctx context.Context) error {
	ctx, cancel := a.patience(ctx)
	defer cancel()
	answer, err := a.client.Reload(ctx)
	if err != nil {
		return err
	}
	if len(answer.Changes) == 0 {
		return a.print("read again, nothing changed\n")
	}
	s := a.screen(a.stdout)
	text := ""
	for _, change := range answer.Changes {
		text += s.paragraph("", change, plain)
	}
	return a.print(text)
}
