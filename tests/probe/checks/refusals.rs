//! What a device without Ethernet below it, and without a vendor, says to what it cannot do.

use anyhow::{Context as _, Result, ensure};
use verbs_abi::ffi::*;

use crate::{
    library::library,
    pair::{Pair, Setup},
    verbs::Context,
};

fn unsupported(what: &str, code: i32) -> Result<()> {
    ensure!(
        code == libc::EOPNOTSUPP,
        "{what}: {} instead of EOPNOTSUPP",
        std::io::Error::from_raw_os_error(code)
    );
    Ok(())
}

/// The errno of a verb that has returned a null pointer.
fn null<T>(what: &str, made: *mut T) -> Result<()> {
    let code = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    ensure!(made.is_null(), "{what} was made");
    unsupported(what, code)
}

pub(crate) fn not_offered() -> Result<()> {
    let context = Context::open()?;
    let verbs = context.extended()?;
    let raw = context.raw();
    // SAFETY: the context is alive and an extended one; whatever is called gets attributes of its own type, alive
    // during the call, and is expected to look at none of them.
    unsafe {
        let create = (*verbs).create_wq.context("no create_wq")?;
        null("a WQ", create(raw, &mut ibv_wq_init_attr::default()))?;
        let create = (*verbs).create_rwq_ind_table.context("no create_rwq_ind_table")?;
        null("an indirection table", create(raw, &mut ibv_rwq_ind_table_init_attr::default()))?;
        let create = (*verbs).create_counters.context("no create_counters")?;
        null("counters", create(raw, &mut ibv_counters_init_attr::default()))?;
    }
    let pair = Pair::unconnected(&Setup::new(IBV_QPT_UD))?;
    // SAFETY: as above; the QP is alive.
    unsafe {
        let create = (*verbs).ibv_create_flow.context("no create_flow")?;
        null("a flow", create(pair.a.qp.raw(), &mut ibv_flow_attr::default()))?;
    }
    let attr = context.device_attr_ex()?;
    ensure!(attr.raw_packet_caps == 0 && attr.rss_caps.supported_qpts == 0 && attr.max_wq_type_rq == 0);
    ensure!(attr.tso_caps.max_tso == 0 && attr.tm_caps.max_num_tags == 0);
    Ok(())
}

/// Nothing is promised of the order in which a message becomes visible but that its last word is the last.
pub(crate) fn data_in_order() -> Result<()> {
    let pair = Pair::of(IBV_QPT_RC)?;
    for opcode in [IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ, IBV_WR_SEND] {
        for flags in [0, 1, 1 << 9] {
            // SAFETY: the QP is alive.
            let order = unsafe { (library().ibv_query_qp_data_in_order)(pair.a.qp.raw(), opcode, flags) };
            ensure!(order == 0, "opcode {opcode}, flags {flags}: {order}");
        }
    }
    Ok(())
}

/// Enhancements are agreed upon with devices of the own kind, and come down to none.
pub(crate) fn enhancements() -> Result<()> {
    let pair = Pair::unconnected(&Setup::new(IBV_QPT_RC))?;
    let (a, b) = (&pair.a, &pair.b);
    let vendor = a.context.device_attr()?.vendor_id;
    let mut ece = ibv_ece { vendor_id: 7, options: 7, comp_mask: 7 };
    // SAFETY: the QP is alive, the answer is ours.
    let code = unsafe { (library().ibv_query_ece)(a.qp.raw(), &mut ece) };
    ensure!(code == 0 && (ece.vendor_id, ece.options, ece.comp_mask) == (vendor, 0, 0), "{code}: {ece:?}");
    let set = |vendor_id, options, comp_mask| {
        let mut ece = ibv_ece { vendor_id, options, comp_mask };
        // SAFETY: as above.
        let code = unsafe { (library().ibv_set_ece)(b.qp.raw(), &mut ece) };
        (code, ece.options)
    };
    ensure!(set(vendor, 0xff, 0) == (0, 0), "what is not there was agreed upon");
    ensure!(set(vendor ^ 1, 0, 0).0 == libc::EINVAL, "another vendor's");
    ensure!(set(vendor, 0, 1).0 == libc::EINVAL, "fields of later releases");
    a.connect(b.address()?)?;
    b.connect(a.address()?)?;
    Ok(())
}
