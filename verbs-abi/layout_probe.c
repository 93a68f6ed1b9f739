/*
 * Prints the layout of verbs.h as this machine's C compiler has it, a line an item: the structure, the field (or
 * "size"), the number. ../build.rs compiles and runs it; src/ffi_layout.rs compares. Only what rdma-core has had
 * since version 25 is named, so that any release's header will do.
 */
#include <infiniband/verbs.h>
#include <stddef.h>
#include <stdio.h>

#define SIZE(type) printf("%s size %zu\n", #type, sizeof(struct type))
#define FIELD(type, field) printf("%s %s %zu\n", #type, #field, offsetof(struct type, field))

static void objects(void)
{
	FIELD(ibv_device, name);
	FIELD(ibv_device, dev_name);
	FIELD(ibv_device, dev_path);
	SIZE(ibv_device);
	FIELD(ibv_context_ops, poll_cq);
	FIELD(ibv_context_ops, req_notify_cq);
	FIELD(ibv_context_ops, post_srq_recv);
	FIELD(ibv_context_ops, post_send);
	FIELD(ibv_context_ops, post_recv);
	SIZE(ibv_context_ops);
	FIELD(ibv_context, device);
	FIELD(ibv_context, ops);
	FIELD(ibv_context, cmd_fd);
	FIELD(ibv_context, async_fd);
	FIELD(ibv_context, num_comp_vectors);
	FIELD(ibv_context, mutex);
	FIELD(ibv_context, abi_compat);
	SIZE(ibv_context);
	SIZE(ibv_pd);
	FIELD(ibv_mr, addr);
	FIELD(ibv_mr, length);
	FIELD(ibv_mr, lkey);
	FIELD(ibv_mr, rkey);
	SIZE(ibv_mr);
	SIZE(ibv_mw);
	SIZE(ibv_ah);
	FIELD(ibv_comp_channel, fd);
	FIELD(ibv_comp_channel, refcnt);
	SIZE(ibv_comp_channel);
}

static void queues(void)
{
	FIELD(ibv_cq, channel);
	FIELD(ibv_cq, cqe);
	FIELD(ibv_cq, mutex);
	FIELD(ibv_cq, cond);
	FIELD(ibv_cq, comp_events_completed);
	SIZE(ibv_cq);
	FIELD(ibv_cq_ex, comp_mask);
	FIELD(ibv_cq_ex, status);
	FIELD(ibv_cq_ex, wr_id);
	FIELD(ibv_cq_ex, start_poll);
	FIELD(ibv_cq_ex, read_completion_wallclock_ns);
	SIZE(ibv_cq_init_attr_ex);
	FIELD(ibv_qp, qp_num);
	FIELD(ibv_qp, state);
	FIELD(ibv_qp, qp_type);
	FIELD(ibv_qp, mutex);
	FIELD(ibv_qp, events_completed);
	SIZE(ibv_qp);
	FIELD(ibv_qp_ex, comp_mask);
	FIELD(ibv_qp_ex, wr_id);
	FIELD(ibv_qp_ex, wr_flags);
	FIELD(ibv_qp_ex, wr_atomic_cmp_swp);
	FIELD(ibv_qp_ex, wr_send);
	FIELD(ibv_qp_ex, wr_abort);
	FIELD(ibv_srq, mutex);
	FIELD(ibv_srq, events_completed);
	SIZE(ibv_srq);
}

static void requests(void)
{
	FIELD(ibv_wc, status);
	FIELD(ibv_wc, byte_len);
	FIELD(ibv_wc, imm_data);
	FIELD(ibv_wc, qp_num);
	FIELD(ibv_wc, wc_flags);
	FIELD(ibv_wc, dlid_path_bits);
	SIZE(ibv_wc);
	FIELD(ibv_sge, lkey);
	SIZE(ibv_sge);
	FIELD(ibv_send_wr, sg_list);
	FIELD(ibv_send_wr, opcode);
	FIELD(ibv_send_wr, imm_data);
	FIELD(ibv_send_wr, wr.rdma.rkey);
	FIELD(ibv_send_wr, wr.atomic.swap);
	FIELD(ibv_send_wr, wr.ud.remote_qkey);
	FIELD(ibv_send_wr, bind_mw.bind_info);
	SIZE(ibv_send_wr);
	SIZE(ibv_recv_wr);
	SIZE(ibv_mw_bind);
	SIZE(ibv_async_event);
	SIZE(ibv_grh);
}

static void attributes(void)
{
	FIELD(ibv_device_attr, max_mr_size);
	FIELD(ibv_device_attr, atomic_cap);
	FIELD(ibv_device_attr, phys_port_cnt);
	SIZE(ibv_device_attr);
	FIELD(ibv_device_attr_ex, odp_caps);
	FIELD(ibv_device_attr_ex, completion_timestamp_mask);
	FIELD(ibv_device_attr_ex, tm_caps);
	FIELD(ibv_port_attr, gid_tbl_len);
	FIELD(ibv_port_attr, link_layer);
	FIELD(ibv_port_attr, port_cap_flags2);
	FIELD(ibv_ah_attr, is_global);
	FIELD(ibv_ah_attr, port_num);
	SIZE(ibv_ah_attr);
	SIZE(ibv_qp_cap);
	FIELD(ibv_qp_init_attr, cap);
	FIELD(ibv_qp_init_attr, sq_sig_all);
	SIZE(ibv_qp_init_attr);
	FIELD(ibv_qp_init_attr_ex, comp_mask);
	FIELD(ibv_qp_init_attr_ex, pd);
	FIELD(ibv_qp_attr, ah_attr);
	FIELD(ibv_qp_attr, alt_ah_attr);
	FIELD(ibv_qp_attr, min_rnr_timer);
	FIELD(ibv_qp_attr, rate_limit);
	SIZE(ibv_qp_attr);
	SIZE(ibv_srq_init_attr);
}

int main(void)
{
	objects();
	queues();
	requests();
	attributes();
	return 0;
}
