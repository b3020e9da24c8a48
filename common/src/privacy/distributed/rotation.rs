//! Blockwise randomised Hadamard rotation: it spreads a vector evenly over its coordinates and keeps its norm.
