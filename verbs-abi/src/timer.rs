//! The two timers of a QP, from the codes that verbs speaks of to durations.

use std::time::Duration;

/// The RNR timer of each code, in units of 10 us (InfiniBand volume 1, table of RNR NAK timer fields).
const RNR_TIMER: [u32; 32] = [
    65_536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1_024, 1_536, 2_048,
    3_072, 4_096, 6_144, 8_192, 12_288, 16_384, 24_576, 32_768, 49_152,
];

/// How long a requester waits after an RNR NAK with this code. Only the low five bits count.
#[must_use]
pub const fn rnr_timer(code: u8) -> Duration {
    Duration::from_micros(RNR_TIMER[(code & 31) as usize] as u64 * 10)
}

/// How long a requester waits for an acknowledgement with this code: 4.096 us * 2^code; `None`: for ever.
/// Only the low five bits count.
#[must_use]
pub const fn ack_timeout(code: u8) -> Option<Duration> {
    match code & 31 {
        0 => None,
        code => Some(Duration::from_nanos(4_096 << code)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rnr_codes_are_those_of_the_specification() {
        assert_eq!(rnr_timer(0), Duration::from_micros(655_360));
        assert_eq!(rnr_timer(1), Duration::from_micros(10));
        assert_eq!(rnr_timer(12), Duration::from_micros(640));
        assert_eq!(rnr_timer(31), Duration::from_micros(491_520));
    }

    #[test]
    fn longer_rnr_codes_wait_longer() {
        assert!((1..31).all(|code| rnr_timer(code) < rnr_timer(code + 1)));
        assert!(rnr_timer(31) < rnr_timer(0));
    }

    #[test]
    fn ack_timeouts_double_and_zero_is_for_ever() {
        assert_eq!(ack_timeout(0), None);
        assert_eq!(ack_timeout(1), Some(Duration::from_nanos(8_192)));
        assert_eq!(ack_timeout(14), Some(Duration::from_nanos(67_108_864)));
        assert_eq!(ack_timeout(31), Some(Duration::from_nanos(4_096 << 31)));
    }
}
