// Package daemon tests perceptd as its users meet it: the programs are built and run, and asked over their sockets.
package daemon
