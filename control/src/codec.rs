//! The bytes of messages.
//!
//! A message is encoded with `postcard` (variable-length integers, no self-description) and framed by its
//! carrier. Decoding is bounded: a frame is at most [`MAX_MESSAGE_BYTES`], no list can claim more items than the
//! frame has bytes, and what is left over after the message is an error.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::message::{Command, Completion, MAX_MESSAGE_BYTES};

/// Why bytes are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// More bytes than any message has.
    #[error("a message of {bytes} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")]
    TooLong {
        /// Bytes of the frame.
        bytes: usize,
    },
    /// Not the encoding of a message.
    #[error("not a message of version {version}: {source}", version = crate::VERSION)]
    Malformed {
        /// What postcard found.
        #[from]
        source: postcard::Error,
    },
    /// A message and then something else.
    #[error("{bytes} bytes follow the end of a message")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// The message contradicts itself or exceeds a limit.
    #[error("the message breaks the protocol: {0}")]
    Invalid(&'static str),
}

/// Encodes `message` into `out`, which is emptied first. The result may exceed [`MAX_MESSAGE_BYTES`] when a
/// list or text does; the carriers check.
pub fn encode<T: Serialize>(message: &T, out: &mut Vec<u8>) {
    out.clear();
    let bytes = postcard::to_extend(message, std::mem::take(out));
    // Writing to a Vec cannot fail, and none of these types has a length unknown in advance.
    *out = bytes.unwrap_or_default();
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(DecodeError::TooLong { bytes: bytes.len() });
    }
    let (message, rest) = postcard::take_from_bytes(bytes)?;
    if rest.is_empty() { Ok(message) } else { Err(DecodeError::Trailing { bytes: rest.len() }) }
}

/// Decodes one command. What it asks for is not judged here: see [`Command::check`].
///
/// # Errors
/// When the bytes are not exactly one command.
pub fn decode_command(bytes: &[u8]) -> Result<Command, DecodeError> {
    decode(bytes)
}

/// Decodes one completion and checks that it does not contradict itself.
///
/// # Errors
/// When the bytes are not exactly one sound completion.
pub fn decode_completion(bytes: &[u8]) -> Result<Completion, DecodeError> {
    let completion: Completion = decode(bytes)?;
    completion.check()?;
    Ok(completion)
}
