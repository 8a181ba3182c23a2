// Package soak keeps perceptd at full load while its back end fails and its rules change (make soak).
package soak
