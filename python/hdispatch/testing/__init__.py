"""Support for tests and benchmarks: numeric comparison, timers, a null driver."""
