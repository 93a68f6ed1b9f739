//! The 40 bytes of GRH in front of a received datagram (RoCE v2: the IP header that carried it).
//!
//! IPv4: 20 undefined bytes (zeros here), then the IPv4 header with a right checksum, which is how
//! `ibv_init_ah_from_wc` tells the two apart. IPv6: the IPv6 header.

use verbs_abi::{
    proto::Gid,
    shm::{
        cqe::{SL_IPV4, SL_IPV6},
        wqe::Address,
    },
};

/// Bytes of a GRH.
pub(crate) const GRH_LEN: usize = 40;
const UDP: u8 = 17;
const UDP_HEADER: u16 = 8;
const BTH_DETH_ICRC: u16 = 12 + 8 + 4;

/// The IPv4 address in a GID, if it holds one.
fn ipv4(gid: &Gid) -> Option<[u8; 4]> {
    (gid[..10] == [0; 10] && gid[10..12] == [0xff; 2]).then(|| [gid[12], gid[13], gid[14], gid[15]])
}

/// The GRH of a datagram of `payload` bytes.
pub(crate) fn grh(sgid: &Gid, address: &Address, payload: u64) -> [u8; GRH_LEN] {
    let mut grh = [0; GRH_LEN];
    let udp_length = payload as u16 + UDP_HEADER + BTH_DETH_ICRC;
    match (ipv4(sgid), ipv4(&address.dgid)) {
        (Some(source), Some(target)) => {
            let ip = &mut grh[20..];
            ip[0] = 0x45;
            ip[1] = address.traffic_class;
            ip[2..4].copy_from_slice(&(udp_length + 20).to_be_bytes());
            ip[6] = 0x40;
            ip[8] = address.hop_limit;
            ip[9] = UDP;
            ip[12..16].copy_from_slice(&source);
            ip[16..20].copy_from_slice(&target);
            let sum = checksum(ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        _ => {
            let class = u32::from(address.traffic_class) << 20;
            let first = 6 << 28 | class | address.flow_label & 0xf_ffff;
            grh[..4].copy_from_slice(&first.to_be_bytes());
            grh[4..6].copy_from_slice(&udp_length.to_be_bytes());
            grh[6] = UDP;
            grh[7] = address.hop_limit;
            grh[8..24].copy_from_slice(sgid);
            grh[24..40].copy_from_slice(&address.dgid);
        }
    }
    grh
}

/// What `ibv_wc.sl` says of a datagram with this GRH.
pub(crate) fn packet_kind(grh: &[u8; GRH_LEN]) -> u8 {
    // Zeros stand where an IPv6 header would begin with its version.
    if grh[0] >> 4 == 6 { SL_IPV6 } else { SL_IPV4 }
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_header_sums_to_zero() {
        let gid = |last| std::array::from_fn(|i| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 0, last][i]);
        let grh = grh(&gid(1), &Address { dgid: gid(2), hop_limit: 64, ..Address::default() }, 100);
        assert_eq!(checksum(&grh[20..]), 0);
        assert_eq!(grh[36..40], [10, 0, 0, 2]);
        assert_eq!(packet_kind(&grh), SL_IPV4);
    }

    #[test]
    fn an_ipv6_header_names_both_ends() {
        let address = Address { dgid: [2; 16], hop_limit: 9, flow_label: 5, ..Address::default() };
        let grh = grh(&[1; 16], &address, 0);
        assert_eq!(grh[0] >> 4, 6);
        assert_eq!(grh[8..24], [1; 16]);
        assert_eq!(grh[24..], [2; 16]);
        assert_eq!(packet_kind(&grh), SL_IPV6);
    }
}
