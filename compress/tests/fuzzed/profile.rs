//! Profiles.

use compress::Profile;

/// A profile's text: it is refused with a reason, or it means the same after being written and read again.
pub(crate) fn profile(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Profile::parse(text) {
        Ok(profile) => {
            let again = Profile::parse(&profile.to_text());
            assert_eq!(again.as_ref().map(Profile::id), Ok(profile.id()), "{}", profile.to_text());
            assert_eq!(again.as_ref(), Ok(&profile));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
