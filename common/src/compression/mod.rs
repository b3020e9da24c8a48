//! What an update becomes on its way to the coordinator when it is not masked: fewer coordinates, fewer bits.
