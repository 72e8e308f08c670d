//! The way out: chunks of a serving process, encoded and put into a store.
//!
//! A chunk goes from the control thread ([`saves`]) to a decode lcore, which reads its planes, one after the other, and encodes
//! them while no plane of a fetch waits ([`encode`]); from there to its queue, which offers it to the store and sends what
//! the store pulls ([`offers`]); and back to the control thread. It travels as a [`job::SaveJob`], of which there are as
//! many as `--save-chunks` says: that bounds the memory, and how much is under way.

pub(crate) mod encode;
pub(crate) mod job;
pub(crate) mod offers;
pub(crate) mod saves;
