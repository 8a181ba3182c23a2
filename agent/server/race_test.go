//go:build race

package server

const raceDetector = true // which takes memory of its own
