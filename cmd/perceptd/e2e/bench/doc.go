// Package bench measures perceptd beside net/http and nginx, and under floods (make bench, make bench-flood).
package bench
