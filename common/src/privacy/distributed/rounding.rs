//! Stochastic rounding to integers, with and without a bound on the result.
