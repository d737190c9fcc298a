package keeper

// RunWith is Run with a machine's uptime of the test's own.
var RunWith = run
