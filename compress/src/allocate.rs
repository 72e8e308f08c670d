//! Which codec each plane gets, given what every codec costs and errs there.
//!
//! Bits are worth most where they take away most error, so planes start at their smallest candidate and the step with the
//! most error per byte is taken next, over all planes, until the goal is met. Only candidates on the lower convex hull of
//! a plane's errors over bytes are considered; on those this is the best that any choice can do at the sizes that it
//! passes through (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988).

/// What one codec makes of one plane.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Encoded bytes.
    pub bytes: u64,
    /// The error, not negative, in any unit that can be added up over planes.
    pub error: f64,
}

/// When to stop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// The least error within so many bytes.
    Bytes(u64),
    /// The fewest bytes with at most this sum of errors.
    Error(f64),
}

/// One candidate, by its number, for every plane. Where even the best can't meet the goal, the nearest to it.
///
/// # Panics
/// When a plane has no candidates.
#[must_use]
pub fn allocate(planes: &[Vec<Candidate>], goal: Goal) -> Vec<usize> {
    let hulls: Vec<Vec<usize>> = planes.iter().map(|candidates| hull(candidates)).collect();
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (plane, hull) in hulls.iter().enumerate() {
        for (step, pair) in hull.windows(2).enumerate() {
            steps.push((slope(planes[plane][pair[0]], planes[plane][pair[1]]), plane, step + 1));
        }
    }
    // Along a hull slopes fall, so sorting keeps a plane's steps in their order.
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let mut chosen: Vec<usize> = hulls.iter().map(|hull| hull[0]).collect();
    let mut bytes: u64 = chosen.iter().zip(planes).map(|(&at, plane)| plane[at].bytes).sum();
    let mut error: f64 = chosen.iter().zip(planes).map(|(&at, plane)| plane[at].error).sum();
    for (_, plane, step) in steps {
        let (from, to) = (planes[plane][chosen[plane]], planes[plane][hulls[plane][step]]);
        let after = bytes - from.bytes + to.bytes;
        match goal {
            Goal::Bytes(most) if after > most => break,
            Goal::Error(most) if error <= most => break,
            _ => {}
        }
        (bytes, error) = (after, error - from.error + to.error);
        chosen[plane] = hulls[plane][step];
    }
    chosen
}

/// Error taken away per byte spent.
fn slope(from: Candidate, to: Candidate) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "sizes of planes are far below 2^53")]
    let bytes = (to.bytes - from.bytes) as f64;
    (from.error - to.error) / bytes
}

/// The candidates on the lower convex hull, from the smallest to the one with the least error.
fn hull(candidates: &[Candidate]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (candidates[a], candidates[b]);
        a.bytes.cmp(&b.bytes).then(a.error.total_cmp(&b.error))
    });
    let mut hull: Vec<usize> = Vec::new();
    for next in order {
        if hull.last().is_some_and(|&last| candidates[next].error >= candidates[last].error) {
            continue;
        }
        while let [.., before, last] = hull[..] {
            let bends_down =
                slope(candidates[before], candidates[last]) <= slope(candidates[last], candidates[next]);
            if !bends_down {
                break;
            }
            hull.pop();
        }
        hull.push(next);
    }
    assert!(!hull.is_empty(), "every plane has candidates");
    hull
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let candidate =
            (1_u64..60, 0_u32..50).prop_map(|(bytes, error)| Candidate { bytes, error: f64::from(error) });
        proptest::collection::vec(candidate, 1..5)
    }

    fn totals(planes: &[Vec<Candidate>], chosen: &[usize]) -> (u64, f64) {
        let picked = || planes.iter().zip(chosen).map(|(plane, &at)| plane[at]);
        (picked().map(|candidate| candidate.bytes).sum(), picked().map(|candidate| candidate.error).sum())
    }

    /// Bytes and error of every possible choice.
    fn all_choices(planes: &[Vec<Candidate>]) -> Vec<(u64, f64)> {
        planes.iter().fold(vec![(0, 0.0)], |sums, plane| {
            let add = |&(bytes, error): &(u64, f64)| {
                plane.iter().map(move |candidate| (bytes + candidate.bytes, error + candidate.error))
            };
            sums.iter().flat_map(add).collect()
        })
    }

    proptest! {
        #[test]
        fn no_choice_of_its_size_errs_less(
            planes in proptest::collection::vec(candidates(), 1..5), most in 0_u64..240, most_error in 0_u32..200,
        ) {
            for goal in [Goal::Bytes(most), Goal::Error(f64::from(most_error))] {
                let (bytes, error) = totals(&planes, &allocate(&planes, goal));
                for (other_bytes, other_error) in all_choices(&planes) {
                    prop_assert!(other_bytes > bytes || other_error >= error);
                }
            }
        }

        #[test]
        fn goals_are_met_where_they_can_be(
            planes in proptest::collection::vec(candidates(), 1..5), most in 0_u64..240, most_error in 0_u32..200,
        ) {
            let choices = all_choices(&planes);
            let (bytes, _) = totals(&planes, &allocate(&planes, Goal::Bytes(most)));
            let least_bytes = choices.iter().map(|choice| choice.0).min().unwrap();
            prop_assert!(bytes <= most || bytes == least_bytes);
            let (_, error) = totals(&planes, &allocate(&planes, Goal::Error(f64::from(most_error))));
            let least_error = choices.iter().map(|choice| choice.1).fold(f64::INFINITY, f64::min);
            prop_assert!(error <= f64::from(most_error) || error == least_error);
        }
    }
}
