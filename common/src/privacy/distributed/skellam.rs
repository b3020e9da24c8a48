//! A share of Skellam noise: the table sampler and how far it is from exact.
