//go:build torture

package clock

// trusted: machines that run tests have a clock that nobody synchronises, and
// nothing would ever expire on them.
const trusted = true
