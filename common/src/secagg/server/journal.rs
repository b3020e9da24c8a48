//! What a coordinator writes down of a session, so that one that starts again loses no masked round. It holds public
//! keys, sealed shares and lists of clients: nothing that opens an update.

use std::collections::BTreeMap;

use super::super::abort::Abort;
use super::super::bitmap::ClientSet;
use super::super::group::Group;
use super::super::messages::{MessageError, Reader, Shares, ToClient};
use super::super::roster::Roster;
use super::{Session, SessionConfig, Step};

/// One record; they come in this order.
pub(super) enum Record<'a> {
    Roster(ToClient),
    Shares(&'a BTreeMap<u16, Shares>),
    Alive(&'a ClientSet),
    Late(&'a ClientSet),
}

impl Session {
    /// Bytes of a record: the context's hash, a kind, a body.
    pub(super) fn record(&self, record: &Record<'_>) -> Vec<u8> {
        let mut out = self.context.to_vec();
        match record {
            Record::Roster(message) => {
                out.push(1);
                out.extend(message.encode());
            }
            Record::Shares(all) => {
                out.push(2);
                out.extend((all.len() as u16).to_le_bytes());
                for (index, shares) in *all {
                    out.extend(index.to_le_bytes());
                    shares.encode(&mut out);
                }
            }
            Record::Alive(set) | Record::Late(set) => {
                out.push(if matches!(record, Record::Alive(_)) { 3 } else { 4 });
                out.extend(set.clients().to_le_bytes());
                out.extend(set.as_bytes());
            }
        }
        out
    }

    /// A session as its journal left it. Without records it starts anew: nobody was told of a roster.
    ///
    /// Clients send again what the journal lacks: the caller calls [`Session::connected`] for each that connects,
    /// and [`Session::upload_arrived`] for each upload that it still has or gets again. If survivors were fixed
    /// already, each of their uploads is needed again before [`Step::Collect`] can be closed.
    ///
    /// # Errors
    /// [`Abort::Restore`] if a record is damaged, of another session or out of order.
    pub fn restore(config: SessionConfig, records: &[Vec<u8>]) -> Result<Self, Abort> {
        let mut session = Self::new(config);
        for record in records {
            let body = record.strip_prefix(&session.context).ok_or(Abort::Restore)?;
            let (kind, body) = body.split_first().ok_or(Abort::Restore)?;
            session.apply(*kind, body).map_err(|_| Abort::Restore)?;
        }
        Ok(session)
    }

    fn apply(&mut self, kind: u8, body: &[u8]) -> Result<(), MessageError> {
        let damaged = MessageError::Range("a record");
        let mut reader = Reader::unlimited(body);
        match (kind, self.step) {
            (1, Step::Advertise) => {
                let ToClient::Roster { entries, beacon, .. } = ToClient::decode(body)? else {
                    return Err(damaged);
                };
                self.adverts = entries.iter().map(|entry| (entry.id, entry.clone())).collect();
                let roster = Roster::new(entries).map_err(|_| damaged)?;
                let rules = &self.config.agreement.rules;
                let parameters = rules.parameters(roster.len()).map_err(|_| damaged)?;
                self.group = Some(Group::new(&self.context, roster, parameters, beacon));
                self.step = Step::Shares;
                return Ok(());
            }
            (2, Step::Shares) => {
                for _ in 0..reader.u16()? {
                    let index = reader.u16()?;
                    self.shares.insert(index, Shares::decode(&mut reader)?);
                }
                let clients = self.group.as_ref().map_or(0, |group| group.roster.len());
                self.shared = Some(ClientSet::of(clients, self.shares.keys().copied()));
                self.step = Step::Collect;
            }
            (3, Step::Collect) if self.alive.is_none() => self.alive = Some(reader.set()?),
            (4, Step::Collect) if self.alive.is_some() && self.silent.is_none() => {
                self.silent = Some(reader.set()?);
            }
            _ => return Err(damaged),
        }
        reader.end()
    }
}
