//! The messages of a session in canonical bytes. The transport carries them without reading them.
//!
//! Numbers are little-endian. Decoding never panics, refuses anything that is not the encoding of a message, and
//! allocates no more than the bytes that came.

use super::abort::Reason;
use super::bitmap::ClientSet;
use super::context::{Hash, SessionTag};
use super::keys::{SEALED_BYTES, Secret};
use super::parameters::{MAXIMUM_CLIENTS, MAXIMUM_NEIGHBOURS};
use super::roster::{ENTRY_BYTES, Entry};

/// Longest message that is read: a roster of [`MAXIMUM_CLIENTS`].
pub const MAXIMUM_MESSAGE_BYTES: usize = MAXIMUM_CLIENTS as usize * ENTRY_BYTES + 64;

/// A sealed share.
pub type Sealed = [u8; SEALED_BYTES];

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Longer than any message.
    #[error("a message of {0} bytes is longer than {MAXIMUM_MESSAGE_BYTES}")]
    TooLong(usize),
    /// It ends too early.
    #[error("the message ends too early: it was cut off")]
    Truncated,
    /// Something follows.
    #[error("the message is longer than it says")]
    Trailing,
    /// No such kind of message.
    #[error("there is no message of kind {0}: the other side has another version")]
    Kind(u8),
    /// A count or a value is out of range.
    #[error("a value of the message is out of range: {0}")]
    Range(&'static str),
}

/// A client's sealed shares, one for each neighbour in the order of the roster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shares {
    /// The session.
    pub session: SessionTag,
    /// One for each neighbour.
    pub sealed: Vec<Sealed>,
    /// The commitment to the sender's own mask.
    pub commitment: Hash,
    /// The sender's signature over all of it.
    pub signature: [u8; 64],
}

/// What a survivor reveals.
#[derive(Clone)]
pub struct Unmask {
    /// The session.
    pub session: SessionTag,
    /// The sender's own mask.
    pub own: Secret,
    /// Its shares of the pair secrets of dead neighbours: owner's index and share, ascending.
    pub dead: Vec<(u16, Secret)>,
}

/// The answer to [`ToClient::Late`].
#[derive(Clone)]
pub struct Late {
    /// The session.
    pub session: SessionTag,
    /// Shares of the own masks of survivors that fell silent: owner's index and share, ascending.
    pub silent: Vec<(u16, Secret)>,
}

/// What a client sends.
#[derive(Clone)]
pub enum ToServer {
    /// Its keys for this attempt.
    Advertise(Entry),
    /// Sealed shares of its secrets.
    Shares(Shares),
    /// Neighbours whose shares could not be opened.
    Complaints {
        /// The session.
        session: SessionTag,
        /// The senders.
        about: ClientSet,
    },
    /// It confirms the survivors.
    AliveSig {
        /// The session.
        session: SessionTag,
        /// By its identity, over the bitmap.
        signature: [u8; 64],
    },
    /// It helps to open the sum.
    Unmask(Unmask),
    /// It helps with survivors that fell silent.
    Late(Late),
    /// It leaves.
    Abort(Reason),
}

/// What the coordinator sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToClient {
    /// Who takes part.
    Roster {
        /// All entries, sorted by id.
        entries: Vec<Entry>,
        /// A value that was fixed after the roster.
        beacon: Hash,
        /// Neighbours of each client.
        neighbours: u16,
        /// The threshold.
        threshold: u16,
    },
    /// The neighbours' sealed shares.
    RoutedShares {
        /// The session.
        session: SessionTag,
        /// All clients that shared.
        shared: ClientSet,
        /// The neighbours' shares for this client: sender's index and share, ascending.
        sealed: Vec<(u16, Sealed)>,
    },
    /// Who survived.
    Alive {
        /// The session.
        session: SessionTag,
        /// The survivors.
        alive: ClientSet,
    },
    /// Who confirmed it; asks for [`ToServer::Unmask`].
    AliveSigs {
        /// The session.
        session: SessionTag,
        /// Signer's index and signature, ascending.
        signatures: Vec<(u16, [u8; 64])>,
    },
    /// Some survivors fell silent; asks for [`ToServer::Late`].
    Late {
        /// The session.
        session: SessionTag,
        /// The survivors, as before.
        alive: ClientSet,
        /// Those of them that fell silent.
        silent: ClientSet,
    },
    /// The sum was opened and taken.
    Committed {
        /// The session.
        session: SessionTag,
        /// Whose updates it sums.
        alive: ClientSet,
    },
    /// The session ended.
    Abort(Reason),
}

impl ToServer {
    /// What it is called in errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Advertise(_) => "advertisement",
            Self::Shares(_) => "set of shares",
            Self::Complaints { .. } => "complaint",
            Self::AliveSig { .. } => "confirmation",
            Self::Unmask(_) => "unmasking",
            Self::Late(_) => "late unmasking",
            Self::Abort(_) => "abort",
        }
    }

    /// Canonical bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Advertise(entry) => {
                out.push(1);
                entry.encode(&mut out);
            }
            Self::Shares(shares) => {
                out.push(2);
                shares.encode(&mut out);
            }
            Self::Complaints { session, about } => {
                out.push(3);
                out.extend(session);
                put_set(&mut out, about);
            }
            Self::AliveSig { session, signature } => {
                out.push(4);
                out.extend(session);
                out.extend(signature);
            }
            Self::Unmask(unmask) => {
                out.push(5);
                out.extend(unmask.session);
                out.extend(unmask.own.0);
                put_list(&mut out, &unmask.dead, |secret| &secret.0);
            }
            Self::Late(late) => {
                out.push(6);
                out.extend(late.session);
                put_list(&mut out, &late.silent, |secret| &secret.0);
            }
            Self::Abort(reason) => out.extend([7, reason.code()]),
        }
        out
    }

    /// Reads a message.
    ///
    /// # Errors
    /// [`MessageError`] for anything that [`ToServer::encode`] does not write.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes)?;
        let message = match reader.byte()? {
            1 => Self::Advertise(reader.entry()?),
            2 => Self::Shares(Shares::decode(&mut reader)?),
            3 => Self::Complaints { session: reader.array()?, about: reader.set()? },
            4 => Self::AliveSig { session: reader.array()?, signature: reader.array()? },
            5 => Self::Unmask(Unmask {
                session: reader.array()?,
                own: Secret(reader.array()?),
                dead: reader.list(MAXIMUM_NEIGHBOURS, Secret)?,
            }),
            6 => Self::Late(Late {
                session: reader.array()?,
                silent: reader.list(MAXIMUM_NEIGHBOURS, Secret)?,
            }),
            7 => Self::Abort(reader.reason()?),
            kind => return Err(MessageError::Kind(kind)),
        };
        reader.end()?;
        Ok(message)
    }
}

impl Shares {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.session);
        out.extend((self.sealed.len() as u16).to_le_bytes());
        out.extend(self.sealed.as_flattened());
        out.extend(self.commitment);
        out.extend(self.signature);
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, MessageError> {
        let session = reader.array()?;
        let count = reader.count(MAXIMUM_NEIGHBOURS)?;
        let sealed = (0..count).map(|_| reader.array()).collect::<Result<_, _>>()?;
        Ok(Self { session, sealed, commitment: reader.array()?, signature: reader.array()? })
    }
}

impl ToClient {
    /// What it is called in errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Roster { .. } => "roster",
            Self::RoutedShares { .. } => "set of routed shares",
            Self::Alive { .. } => "list of survivors",
            Self::AliveSigs { .. } => "list of confirmations",
            Self::Late { .. } => "list of silent survivors",
            Self::Committed { .. } => "commit",
            Self::Abort(_) => "abort",
        }
    }

    /// Canonical bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Roster { entries, beacon, neighbours, threshold } => {
                out.push(1);
                out.extend((entries.len() as u16).to_le_bytes());
                entries.iter().for_each(|entry| entry.encode(&mut out));
                out.extend(beacon);
                out.extend(neighbours.to_le_bytes());
                out.extend(threshold.to_le_bytes());
            }
            Self::RoutedShares { session, shared, sealed } => {
                out.push(2);
                out.extend(session);
                put_set(&mut out, shared);
                put_list(&mut out, sealed, |sealed| sealed);
            }
            Self::Alive { session, alive } => {
                out.push(3);
                out.extend(session);
                put_set(&mut out, alive);
            }
            Self::AliveSigs { session, signatures } => {
                out.push(4);
                out.extend(session);
                put_list(&mut out, signatures, |signature| signature);
            }
            Self::Late { session, alive, silent } => {
                out.push(5);
                out.extend(session);
                put_set(&mut out, alive);
                put_set(&mut out, silent);
            }
            Self::Committed { session, alive } => {
                out.push(6);
                out.extend(session);
                put_set(&mut out, alive);
            }
            Self::Abort(reason) => out.extend([7, reason.code()]),
        }
        out
    }

    /// Reads a message.
    ///
    /// # Errors
    /// [`MessageError`] for anything that [`ToClient::encode`] does not write.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let mut reader = Reader::new(bytes)?;
        let message = match reader.byte()? {
            1 => {
                let count = reader.count(MAXIMUM_CLIENTS)?;
                let entries = (0..count).map(|_| reader.entry()).collect::<Result<_, _>>()?;
                let beacon = reader.array()?;
                Self::Roster { entries, beacon, neighbours: reader.u16()?, threshold: reader.u16()? }
            }
            2 => Self::RoutedShares {
                session: reader.array()?,
                shared: reader.set()?,
                sealed: reader.list(MAXIMUM_NEIGHBOURS, |sealed| sealed)?,
            },
            3 => Self::Alive { session: reader.array()?, alive: reader.set()? },
            4 => Self::AliveSigs {
                session: reader.array()?,
                signatures: reader.list(MAXIMUM_NEIGHBOURS + 1, |signature| signature)?,
            },
            5 => Self::Late { session: reader.array()?, alive: reader.set()?, silent: reader.set()? },
            6 => Self::Committed { session: reader.array()?, alive: reader.set()? },
            7 => Self::Abort(reader.reason()?),
            kind => return Err(MessageError::Kind(kind)),
        };
        reader.end()?;
        Ok(message)
    }
}

fn put_set(out: &mut Vec<u8>, set: &ClientSet) {
    out.extend(set.clients().to_le_bytes());
    out.extend(set.as_bytes());
}

fn put_list<T, const N: usize>(out: &mut Vec<u8>, list: &[(u16, T)], bytes: impl Fn(&T) -> &[u8; N]) {
    out.extend((list.len() as u16).to_le_bytes());
    for (index, item) in list {
        out.extend(index.to_le_bytes());
        out.extend(bytes(item));
    }
}

/// Reads canonical bytes from the front.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self, MessageError> {
        if bytes.len() > MAXIMUM_MESSAGE_BYTES {
            Err(MessageError::TooLong(bytes.len()))
        } else {
            Ok(Self(bytes))
        }
    }

    /// A reader of one's own bytes, of any length.
    pub(crate) fn unlimited(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let (array, rest) = self.0.split_first_chunk().ok_or(MessageError::Truncated)?;
        self.0 = rest;
        Ok(*array)
    }

    pub(crate) fn byte(&mut self) -> Result<u8, MessageError> {
        self.array().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, MessageError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn count(&mut self, maximum: u16) -> Result<u16, MessageError> {
        let count = self.u16()?;
        if count > maximum { Err(MessageError::Range("too many items")) } else { Ok(count) }
    }

    pub(crate) fn entry(&mut self) -> Result<Entry, MessageError> {
        Entry::decode(&self.array()?).ok_or(MessageError::Truncated)
    }

    pub(crate) fn set(&mut self) -> Result<ClientSet, MessageError> {
        let clients = self.count(MAXIMUM_CLIENTS)?;
        let length = usize::from(clients).div_ceil(8);
        let (bits, rest) = self.0.split_at_checked(length).ok_or(MessageError::Truncated)?;
        self.0 = rest;
        ClientSet::from_bytes(clients, bits).ok_or(MessageError::Range("a bit behind the last client"))
    }

    pub(crate) fn list<T, const N: usize>(
        &mut self,
        maximum: u16,
        item: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<(u16, T)>, MessageError> {
        let count = self.count(maximum)?;
        let mut list: Vec<(u16, T)> = Vec::new();
        for _ in 0..count {
            let index = self.count(MAXIMUM_CLIENTS)?;
            if list.last().is_some_and(|(last, _)| *last >= index) {
                return Err(MessageError::Range("items are not in order"));
            }
            list.push((index, item(self.array()?)));
        }
        Ok(list)
    }

    fn reason(&mut self) -> Result<Reason, MessageError> {
        Reason::from_code(self.byte()?).ok_or(MessageError::Range("no such reason"))
    }

    pub(crate) fn end(&self) -> Result<(), MessageError> {
        if self.0.is_empty() { Ok(()) } else { Err(MessageError::Trailing) }
    }
}
