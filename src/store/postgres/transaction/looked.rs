//! What is found of a record before a handler runs in its transaction.

use super::statements::held;
use crate::{
    error::StoreError,
    record::{Claim, RecordId},
    store::postgres::record::{self, Row},
    transactional::{Found, Whose},
};

/// What a claim or a look showed.
#[derive(Debug)]
pub(in super::super) struct Looked {
    pub(super) held: i32,
    /// Where, if it is claimed now.
    pub(super) claimed: Option<Place>,
    pub(super) row: Option<Row>,
}

/// Where the row of a record is that was claimed, as the server writes it.
#[derive(Debug)]
pub(in super::super) struct Place(pub(super) String);

pub(super) enum Looking {
    Claimed(Place),
    Found(Found),
    /// It counts as vacant, and nobody else has claimed it.
    Expired,
}

impl Looked {
    pub(super) fn claimed(place: Place) -> Self {
        Self {
            held: held::NONE,
            claimed: Some(place),
            row: None,
        }
    }

    /// What is committed says more than who is at work. `None` if there is nothing and nobody.
    pub(super) fn found(self, id: &RecordId, claim: &Claim) -> Result<Option<Looking>, StoreError> {
        let in_flight = || match self.held {
            held::NONE => None,
            held::FIRST => Some(Looking::Found(Found::InFlight(Whose::Same))),
            _ => Some(Looking::Found(Found::InFlight(Whose::Unclear))),
        };
        if let Some(place) = self.claimed {
            return Ok(Some(Looking::Claimed(place)));
        }
        let Some(row) = self.row else {
            return Ok(in_flight());
        };
        Ok(match row.found(id, claim.owner)? {
            record::Found::Expired => Some(in_flight().unwrap_or(Looking::Expired)),
            record::Found::Other(begin) => Some(Looking::Found(Found::Kept(begin))),
            // No claim of this owner was ever committed.
            record::Found::Own => None,
        })
    }
}
