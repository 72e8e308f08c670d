//! Both ends of a PUT: how an encoded chunk comes from a data plane into a store.
//!
//! The receiver drives, as in a fetch with the ends changed. A data plane *offers* a chunk; the store answers what becomes of
//! it, and, if it wants the chunk and has memory for all of it, pulls it with the same PULL and DATA messages, by the rules of a
//! fetch (`crate::pull`), asking again for what does not arrive. A chunk becomes visible at once and whole, after header and planes were found
//! right.
//!
//! - [`offer`]: the data plane's engine, [`OfferEngine`]: offers chunks until each is stored, refused, or out of time;
//! - [`accept`]: the store's engine, [`AcceptEngine`]: pulls what it was offered.
//!
//! An OFFER may be repeated at any time and does the same as once; its answer says how things stand. That is all the
//! recovery there is: of lost OFFERs, of lost answers, and of a store that restarted and has forgotten what it was pulling.
pub mod accept;
pub mod offer;

pub use accept::{
    AcceptConfig, AcceptCounters, AcceptEngine, AcceptEvent, Declined, Intake, PutVerdict, Taken,
};
pub use offer::{
    OfferConfig, OfferCounters, OfferEnd, OfferEngine, OfferEvent, OfferFailure, OfferId, OfferStartError,
    OfferTo, OfferTransmit,
};
