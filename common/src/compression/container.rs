//! The versioned container of an encoded update, and the schemes that a job can ask for.

use rand::Rng;

use super::positions::Plan;
use super::select;
use super::support::SupportError;
use super::values::{MOST_LEVELS, Plane, ValueCodec};
use crate::aggregate::{self, AggregateError};

/// What every container begins with.
const MAGIC: [u8; 4] = *b"TRBC";
/// The version of the format.
const VERSION: u8 = 1;
/// Bytes before the planes.
const HEADER_BYTES: usize = 32;
const WHAT: &str = "an encoded update";

/// Most parameters of a model whose updates may be sparse: positions are 32 bits wide.
pub const SPARSE_PARAMETERS: usize = u32::MAX as usize;

/// How a job's updates are encoded. Every member of a cohort uses the job's scheme.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scheme {
    /// Every coordinate as `f32`: 32 bits each, exact.
    Dense,
    /// The coordinates of largest magnitude and where they are; the rest is zero at the receiver.
    TopK {
        /// The share of all coordinates that is sent, above 0 and at most 1.
        density: f64,
        /// How the sent values are written.
        values: ValueCodec,
    },
    /// Every coordinate in 8 bits, rounded at random without bias, 256 coordinates to a scale.
    Int8,
    /// Every coordinate as one of 2·`levels` + 1 values, rounded at random without bias (QSGD).
    Qsgd {
        /// Steps between zero and the largest magnitude of 256 coordinates, 1 to 32,767.
        levels: u16,
    },
}

/// An encoded update.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// What is sent.
    pub bytes: Vec<u8>,
    /// The update that the receiver will decode from `bytes`, bit for bit, in the order of the job's layout.
    pub received: Vec<f32>,
}

/// A decoded update that is zero but at a few coordinates.
#[derive(Debug, Clone, PartialEq)]
pub struct Sparse {
    /// Length of the flat vector that it stands for.
    pub parameters: usize,
    /// Coordinates, ascending, each below `parameters`.
    pub indices: Vec<u32>,
    /// Their values, as many as indices.
    pub values: Vec<f32>,
}

/// A scheme that no update can be encoded with.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SchemeError {
    /// The density is no share.
    #[error("compression: a density of {0} is not possible; above 0 and at most 1 is")]
    Density(f64),
    /// Too few or too many levels.
    #[error("compression: {0} levels are not possible; 1 to 32767 are")]
    Levels(u16),
    /// The model is too large for sparse updates.
    #[error("compression: top-k of {0} parameters is not possible; up to {SPARSE_PARAMETERS} are")]
    Parameters(usize),
}

/// Why an update is not encoded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// The scheme is impossible.
    #[error(transparent)]
    Scheme(#[from] SchemeError),
    /// The update is one that the coordinator would refuse.
    #[error("this update cannot be encoded: {0}")]
    Update(#[from] AggregateError),
}

/// Why bytes are no encoded update.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DecodeError {
    /// The scheme is impossible.
    #[error(transparent)]
    Scheme(#[from] SchemeError),
    /// Too few or too many bytes.
    #[error("the encoded {what} has {found} bytes, but {expected} are needed")]
    Length {
        /// Which part.
        what: &'static str,
        /// Bytes that are there.
        found: usize,
        /// Bytes that there should be.
        expected: usize,
    },
    /// The bytes begin like something else.
    #[error("these bytes do not begin like {0}")]
    Magic(&'static str),
    /// A version that this program does not read.
    #[error(
        "encoded in version {found} of the format; this program reads version {expected} (update the older side)"
    )]
    Version {
        /// The version found.
        found: u8,
        /// The version known.
        expected: u8,
    },
    /// A field of the header is not what job and model make it.
    #[error("the header says {field} = {found}; this job's is {expected}")]
    Header {
        /// The field's name.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What it should be.
        expected: u64,
    },
    /// The coded positions are damaged or a lie.
    #[error("positions, block {block}: {reason}")]
    Positions {
        /// Which block of coordinates, from 0.
        block: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// A coded value is damaged or a lie.
    #[error("value {at}: {reason}")]
    Value {
        /// Which value, from 0.
        at: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// The bytes hold a support that is none.
    #[error(transparent)]
    Support(#[from] SupportError),
    /// The digest at the end does not fit what is before it.
    #[error("the {0} is damaged: its digest does not fit")]
    Damaged(&'static str),
}

impl Scheme {
    /// Refuses a scheme that is impossible for a model of `parameters` parameters.
    ///
    /// # Errors
    /// [`SchemeError`].
    pub fn check(&self, parameters: usize) -> Result<(), SchemeError> {
        match *self {
            // NaN is not within the range.
            Scheme::TopK { density, .. } if !(f64::MIN_POSITIVE..=1.0).contains(&density) => {
                Err(SchemeError::Density(density))
            }
            Scheme::TopK { .. } if parameters > SPARSE_PARAMETERS => Err(SchemeError::Parameters(parameters)),
            Scheme::Qsgd { levels } if !(1..=MOST_LEVELS).contains(&levels) => {
                Err(SchemeError::Levels(levels))
            }
            _ => Ok(()),
        }
    }

    /// How many coordinates of `parameters` are sent: all, or round(density · parameters) and at least one.
    pub fn kept(&self, parameters: usize) -> usize {
        match *self {
            Scheme::TopK { density, .. } => {
                ((density * parameters as f64).round() as usize).max(1).min(parameters)
            }
            _ => parameters,
        }
    }

    /// The bytes of every encoded update where that is one number: all schemes but top-k, whose positions take more
    /// or fewer bits.
    pub fn exact_bytes(&self, parameters: usize) -> Option<usize> {
        (!matches!(self, Scheme::TopK { .. })).then(|| self.most_bytes(parameters))
    }

    /// The most bytes that an update of `parameters` coordinates can take; what is longer can be refused unread.
    pub fn most_bytes(&self, parameters: usize) -> usize {
        self.container(parameters).most_bytes()
    }

    /// Encodes `update`, which must be finite and within what an aggregate admits.
    ///
    /// `rng` rounds: a named stream without differential privacy, `SecretRng` with it. How much is drawn from it
    /// depends on scheme and length alone.
    ///
    /// # Errors
    /// [`EncodeError`].
    pub fn encode<R: Rng + ?Sized>(&self, update: &[f32], rng: &mut R) -> Result<Encoded, EncodeError> {
        self.check(update.len())?;
        aggregate::check(update)?;
        let container = self.container(update.len());
        let mut bytes = container.header().to_vec();
        if !container.sparse {
            let received = container.plane.encode(update, rng, &mut bytes);
            return Ok(Encoded { bytes, received });
        }
        let indices = select::top_k(update, container.count)
            .map_err(|error| AggregateError::NotFinite { index: error.index, value: error.value })?;
        container.plan().encode(&indices, &mut bytes);
        let values = indices.iter().filter_map(|index| update.get(*index as usize).copied());
        let values = container.plane.encode(&values.collect::<Vec<f32>>(), rng, &mut bytes);
        let received = Sparse { parameters: update.len(), indices, values }.to_dense();
        Ok(Encoded { bytes, received })
    }

    /// Decodes an update of `parameters` coordinates.
    ///
    /// Safe on any bytes: nothing is allocated beyond a few vectors of `parameters` or of the job's number of sent
    /// coordinates, and every value is finite.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(&self, bytes: &[u8], parameters: usize) -> Result<Vec<f32>, DecodeError> {
        let container = self.container(parameters);
        if container.sparse {
            return Ok(self.decode_sparse(bytes, parameters)?.to_dense());
        }
        self.check(parameters)?;
        container.plane.decode(container.after_header(bytes)?, parameters)
    }

    /// Decodes an update without filling in zeros; with a dense scheme every coordinate is listed.
    ///
    /// # Errors
    /// [`DecodeError`], and with a dense scheme [`SchemeError::Parameters`] beyond [`SPARSE_PARAMETERS`].
    pub fn decode_sparse(&self, bytes: &[u8], parameters: usize) -> Result<Sparse, DecodeError> {
        self.check(parameters)?;
        let container = self.container(parameters);
        if !container.sparse {
            let all = u32::try_from(parameters).map_err(|_| SchemeError::Parameters(parameters))?;
            let values = container.plane.decode(container.after_header(bytes)?, parameters)?;
            return Ok(Sparse { parameters, indices: (0..all).collect(), values });
        }
        let (positions, values) = container.sparse_planes(bytes)?;
        let indices = container.plan().decode(positions)?;
        let values = container.plane.decode(values, container.count)?;
        Ok(Sparse { parameters, indices, values })
    }

    fn container(&self, parameters: usize) -> Container {
        let (sparse, plane) = match *self {
            Scheme::Dense => (false, Plane::F32),
            Scheme::TopK { values, .. } => (true, values.into()),
            Scheme::Int8 => (false, Plane::INT8),
            Scheme::Qsgd { levels } => (false, Plane::Levels(levels)),
        };
        Container { sparse, plane, parameters, count: self.kept(parameters) }
    }
}

impl Sparse {
    /// Adds it to a flat vector; coordinates beyond the vector's end are left out.
    pub fn add_to(&self, vector: &mut [f32]) {
        for (index, value) in self.indices.iter().zip(&self.values) {
            if let Some(sum) = vector.get_mut(*index as usize) {
                *sum += value;
            }
        }
    }

    /// The flat vector, zeros filled in.
    pub fn to_dense(&self) -> Vec<f32> {
        let mut dense = vec![0.0; self.parameters];
        for (index, value) in self.indices.iter().zip(&self.values) {
            if let Some(place) = dense.get_mut(*index as usize) {
                *place = *value;
            }
        }
        dense
    }
}

/// What job and model make of a container: everything that its header says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Container {
    pub(super) sparse: bool,
    pub(super) plane: Plane,
    pub(super) parameters: usize,
    pub(super) count: usize,
}

impl Container {
    pub(super) fn plan(&self) -> Plan {
        Plan::new(self.parameters, self.count)
    }

    fn most_bytes(&self) -> usize {
        let positions = if self.sparse { self.plan().most_bytes() } else { 0 };
        HEADER_BYTES + positions + self.plane.bytes(self.count)
    }

    /// The header's fields: name, offset, bytes, value.
    fn fields(&self) -> [(&'static str, usize, usize, u64); 8] {
        let plan = if self.sparse { self.plan() } else { Plan::NONE };
        [
            ("selection", 5, 1, self.sparse.into()),
            ("value codec", 6, 1, self.plane.number().into()),
            ("Rice parameter", 7, 1, plan.rice.into()),
            ("block exponent", 8, 1, plan.block_log2.into()),
            ("reserved byte", 9, 1, 0),
            ("levels", 10, 2, self.plane.levels().into()),
            ("parameters", 16, 8, self.parameters as u64),
            ("coordinates sent", 24, 8, self.count as u64),
        ]
    }

    pub(super) fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let [first, second, third, fourth, version, ..] = &mut header;
        [*first, *second, *third, *fourth] = MAGIC;
        *version = VERSION;
        for (_, offset, bytes, value) in self.fields() {
            for (byte, value) in header.iter_mut().skip(offset).take(bytes).zip(value.to_le_bytes()) {
                *byte = value;
            }
        }
        header
    }

    /// What follows the header, if that is the one that job and model make.
    pub(super) fn after_header<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], DecodeError> {
        let most = self.most_bytes();
        let short = DecodeError::Length { what: "update", found: bytes.len(), expected: HEADER_BYTES };
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(short)?;
        if !header.starts_with(&MAGIC) {
            return Err(DecodeError::Magic(WHAT));
        }
        let [_, _, _, _, version, ..] = *header;
        if version != VERSION {
            return Err(DecodeError::Version { found: version, expected: VERSION });
        }
        for (field, offset, bytes, expected) in self.fields() {
            let read = header.iter().skip(offset).take(bytes).rev();
            let found = read.fold(0, |value, byte| value << 8 | u64::from(*byte));
            if found != expected {
                return Err(DecodeError::Header { field, found, expected });
            }
        }
        if *header != self.header() {
            return Err(DecodeError::Header { field: "reserved bytes", found: 1, expected: 0 });
        }
        if bytes.len() > most {
            return Err(DecodeError::Length { what: "update", found: bytes.len(), expected: most });
        }
        Ok(rest)
    }

    /// The planes of positions and of values.
    pub(super) fn sparse_planes<'a>(&self, bytes: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), DecodeError> {
        let rest = self.after_header(bytes)?;
        let values = self.plane.bytes(self.count);
        let short = DecodeError::Length { what: "values", found: rest.len(), expected: values };
        let positions = rest.len().checked_sub(values).ok_or(short)?;
        Ok(rest.split_at(positions))
    }
}
