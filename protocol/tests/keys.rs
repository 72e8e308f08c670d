//! Keys: the chain as docs/PROTOCOL.md writes it down, and that whatever differs gives another key.
#![allow(missing_docs, clippy::cast_possible_truncation, reason = "a test; its numbers are small")]

use proptest::prelude::*;
use protocol::key::{ChunkKeys, chain};
use protocol::{Key, Namespace};

fn namespace() -> Namespace {
    Namespace {
        model: "model".into(),
        layout: "bf16".into(),
        codec: "int4".into(),
        rank: 1,
        salt: "s".into(),
    }
}

/// One call of BLAKE3 per key over one buffer, as the specification says.
fn slow_chain(namespace: &Namespace, tokens: &[i32]) -> Vec<Key> {
    let mut bytes = Vec::new();
    for text in [&namespace.model, &namespace.layout, &namespace.codec] {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    }
    bytes.extend(namespace.rank.to_le_bytes());
    bytes.extend((namespace.salt.len() as u64).to_le_bytes());
    bytes.extend(namespace.salt.as_bytes());
    let mut parent = blake3::derive_key("shadowserve chunk key root, version 1", &bytes);
    let mut keys = Vec::new();
    for chunk in tokens.chunks(256) {
        let mut bytes = parent.to_vec();
        bytes.extend((chunk.len() as u32).to_le_bytes());
        chunk.iter().for_each(|token| bytes.extend(token.to_le_bytes()));
        parent = blake3::derive_key("shadowserve chunk key, version 1", &bytes);
        keys.push(Key(parent));
    }
    keys
}

#[test]
fn the_chain_does_not_change() {
    let tokens: Vec<i32> = (0..300).collect();
    let keys: Vec<String> = chain(&namespace(), &tokens).iter().map(Key::to_string).collect();
    assert_eq!(keys, KNOWN);
}

const KNOWN: [&str; 2] = [
    "f04926bf620186b5e788f8d6b6ddef072ef3ef63b04053d3d314d8f060676b84",
    "19b99ea3f64b37a1761f2915aa36a679b7cfcc3c4421461ead66acb575f49daf",
];

#[test]
fn every_field_of_the_namespace_counts() {
    let base = namespace();
    let variants = [
        Namespace { model: "model2".into(), ..base.clone() },
        Namespace { layout: "f16".into(), ..base.clone() },
        Namespace { codec: "int8".into(), ..base.clone() },
        Namespace { rank: 0, ..base.clone() },
        Namespace { salt: String::new(), ..base.clone() },
        // The same characters, split otherwise.
        Namespace { model: "modelb".into(), layout: "f16".into(), ..base.clone() },
    ];
    for variant in variants {
        assert_ne!(variant.root(), base.root(), "{variant:?}");
    }
}

proptest! {
    #[test]
    fn equals_the_slow_twin(tokens in proptest::collection::vec(any::<i32>(), 0..1100)) {
        prop_assert_eq!(chain(&namespace(), &tokens), slow_chain(&namespace(), &tokens));
    }

    #[test]
    fn a_key_covers_all_tokens_up_to_it(tokens in proptest::collection::vec(any::<i32>(), 1..1100), at in any::<prop::sample::Index>()) {
        let keys = chain(&namespace(), &tokens);
        let at = at.index(tokens.len());
        let mut other = tokens.clone();
        other[at] ^= 1;
        let others = chain(&namespace(), &other);
        for (chunk, (a, b)) in keys.iter().zip(&others).enumerate() {
            prop_assert_eq!(a == b, chunk < at / 256);
        }
        // A prefix of whole chunks has a prefix of the keys, and a sequence can be continued.
        let whole = tokens.len() / 256 * 256;
        prop_assert_eq!(&chain(&namespace(), &tokens[..whole])[..], &keys[..whole / 256]);
        if let Some(last) = keys[..whole / 256].last() {
            prop_assert!(ChunkKeys::new(*last, &tokens[whole..]).eq(keys[whole / 256..].iter().copied()));
        }
    }
}
