//! Every bound that both sides of a federation must agree on.

/// Longest name of a node, in bytes.
pub const NODE_NAME_BYTES: usize = 63;
/// Longest name of a job, in bytes.
pub const JOB_NAME_BYTES: usize = 63;
/// Longest job file, in bytes.
pub const JOB_FILE_BYTES: usize = 64 * 1024;
/// Most rounds that one job may ask for.
pub const ROUNDS: u32 = 1_000_000;
/// Most members of one cohort, over-selection included.
pub const COHORT_MEMBERS: u32 = 100_000;
/// Most members of one cohort whose updates are masked: every client gets everybody's keys in one message.
pub const MASKED_COHORT_MEMBERS: u32 = 4096;
/// Most parameters of one model: 2^36, or 256 GiB of `f32`.
pub const MODEL_PARAMETERS: u64 = 1 << 36;
/// Most named tensors of one model.
pub const MODEL_TENSORS: usize = 4096;
/// Most values that a layer may make of one example: 2^36.
pub const EXAMPLE_VALUES: usize = 1 << 36;
/// Most features or channels that a layer of a job may yield.
pub const LAYER_WIDTH: usize = 1 << 20;
/// Largest side, stride or padding of a window (convolution or pooling).
pub const WINDOW_SIZE: usize = 65_536;
/// Largest side of a window of maximum pooling: which of its values was chosen fits into 16 bits.
pub const MAX_POOL_SIZE: usize = 256;
/// Most layers in one list of a job: their numbers have two digits, so that their names sort.
pub const LIST_LAYERS: usize = 99;
/// Most layers of a job's network in all, residual branches included.
pub const LAYERS: usize = 1000;
/// How deep residual layers may stand within each other.
pub const RESIDUAL_DEPTH: usize = 4;
/// Payload bytes of one chunk of a model or an update.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Largest protobuf message that either side accepts: one chunk, its digest and some framing.
pub const MESSAGE_BYTES: usize = CHUNK_BYTES + 64 * 1024;
/// Most training examples that one client update may weigh: its weight in the average.
pub const EXAMPLES_PER_UPDATE: u64 = 1 << 32;
/// Most classes a model may tell apart.
pub const CLASSES: usize = 10_000;
/// Longest free text (a reason, a detail) in a message or a record, in bytes; longer ones are cut.
pub const REASON_BYTES: usize = 512;
