"""Test-only shim for JAX's Mosaic-GPU interpret mode (jax 0.10.2, 0.11.2, 0.12.0.1).

Adds what upstream (up to 0.12.0.1) lacks and Hopper attention kernels need:
  * pl.run_state with plgpu.ACC.init(...)        (missing in all three versions)
  * plgpu.wgmma with the A operand in registers  (missing in all three versions)
  * copy_smem_to_gmem(predicate=...) (also used by emit_pipeline outputs) and
    copy_smem_to_gmem(reduction_op="add"|"min"|"max")  (missing in all three versions)
  * race detection of wgmma's asynchronous SMEM operand reads (0.11.2 and 0.12.0.1;
    upstream has "TODO: Vector clocks / Async wgmma"): the read stays open until the
    accumulator is dereferenced, run_state returns, or plgpu.wgmma_wait(n)
  * no race check on REGS buffers (private to a thread; ids recur over grid points)
  * no "all barrier phases must be observed at deallocation" check (as in 0.12.0.1)
  * plgpu.layout_cast, plgpu.load(layout=...), wgmma on plgpu.transpose_ref
                                                 (missing in 0.10.2 only)
No JAX file is edited: `JaxprInterpreter.interpret` is re-exec'ed with extra cases.
"""
import dataclasses, inspect, textwrap, types
import jax
from jax._src import core as jax_core
from jax._src.pallas import primitives as pallas_primitives
from jax._src.pallas.mosaic_gpu import core as mcore
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gc
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret as ji
from jax._src.state import discharge, types as state_types
from jax._src.state import primitives as state_primitives

ns = types.SimpleNamespace
_EMPTY = jax.tree.structure(())


class _Body:  # stands in for the jaxpr inside a synthesized run_scoped eqn
  def __init__(self, invars, fn):
    self.invars, self.constvars, self.fn = invars, [], fn


def _with_regs(self, eqn, token, avals, vals, fn):
  """Runs fn(token, *keys) with per-thread REGS buffers initialised to `vals`.

  fn returns (token, outs); result is (token, final buffer contents, outs)."""
  invars = [ns(aval=state_types.AbstractRef(
      jax_core.ShapedArray(a.shape, a.dtype), mcore.MemorySpace.REGS)) for a in avals]

  def run(token, *keys):
    for key, a, v, x in zip(keys, avals, invars, vals):
      e = ns(primitive=state_primitives.swap_p, params=dict(tree=_EMPTY),
             invars=[v, ns(aval=a)], outvars=[ns(aval=a)], source_info=eqn.source_info)
      token, _ = self._interpret_swap_p(e, token, lambda key=key, x=x: [key, x])
    token, outs = fn(token, *keys)
    finals = []
    for key, a, v in zip(keys, avals, invars):
      e = ns(primitive=state_primitives.get_p, params=dict(tree=_EMPTY),
             invars=[v], outvars=[ns(aval=a)], source_info=eqn.source_info)
      token, o = self._interpret_get_p(e, token, lambda key=key: [key])
      finals.append(o)
    return token, [finals, outs]

  fake = ns(primitive=pallas_primitives.run_scoped_p, source_info=eqn.source_info,
            params=dict(jaxpr=_Body(invars, run), collective_axes=(),
                        ref_transforms=((),) * len(invars)))
  token, (finals, outs) = self._interpret_run_scoped_p(fake, token, lambda: [])
  return token, finals, outs


def _interpret_run_state_p(self, eqn, token, get_invals):
  if not all(eqn.params["is_initialized"]):
    raise NotImplementedError("uninitialized run_state refs")
  invals = get_invals()
  todo = [i for i, v in enumerate(eqn.outvars)
          if not isinstance(v.aval, state_types.AbstractRef)]

  def body(token, *keys):
    args = list(invals)
    for i, key in zip(todo, keys): args[i] = key
    token, outs = self.interpret(eqn.params["jaxpr"], token, *args)
    return _interpret_wgmma_wait(self, token, 0), outs  # run_state awaits all wgmmas

  token, finals, _ = _with_regs(
      self, eqn, token, [eqn.outvars[i].aval for i in todo],
      [invals[i] for i in todo], body)
  outs = list(invals)
  for i, x in zip(todo, finals): outs[i] = x
  return token, outs


def _patch_wgmma(orig):
  def _interpret_wgmma_ref_p(self, eqn, token, get_invals):
    a_aval = eqn.invars[1].aval
    if isinstance(a_aval, state_types.AbstractRef):
      return orig(self, eqn, token, get_invals)
    invals = get_invals()  # acc, a (value in registers), b, *transform leaves
    def body(token, key):
      return orig(self, eqn, token, lambda: [invals[0], key, *invals[2:]])
    token, _, outs = _with_regs(self, eqn, token, [a_aval], [invals[1]], body)
    return token, outs
  return _interpret_wgmma_ref_p


def _interpret_load_p(self, eqn, token, get_invals):  # plgpu.load(..., layout=)
  e = ns(primitive=state_primitives.get_p, params=eqn.params, invars=eqn.invars,
         outvars=eqn.outvars, source_info=eqn.source_info)
  return self._interpret_get_p(e, token, get_invals)


def _interpret_accumulator_store(self, eqn, token, get_invals):  # acc_ref[...] = registers
  inner = eqn.invars[0].aval.inner_aval
  ref = ns(aval=state_types.AbstractRef(
      jax_core.ShapedArray(inner.shape, inner.dtype), mcore.MemorySpace.REGS))
  e = ns(primitive=state_primitives.swap_p, params=dict(tree=_EMPTY),
         invars=[ref, ns(aval=inner)], outvars=[ns(aval=inner)], source_info=eqn.source_info)
  token, old = self._interpret_swap_p(e, token, get_invals)
  return token, old


_CASES = [
    ("run_state_p", "token, out = self._shim_run_state_p(eqn, token, deferred_invals)"),
    ("gpu_load_p", "token, out = self._shim_load_p(eqn, token, deferred_invals)"),
    ("accumulator_store_p", "token, out = self._shim_accumulator_store(eqn, token, deferred_invals)"),
    ("layout_cast_p", "out = deferred_invals()[0]"),
    ("wgmma_wait_p", "token, out = self._shim_wgmma_wait(token, _shim.wait_n(eqn)), []"),
]


def _find_layout_cast():
  return getattr(mcore, "layout_cast_p", None) or getattr(gpu_primitives, "layout_cast_p")


def _patch_race_state():
  try:
    from jax._src.pallas.mosaic.interpret import race_detection_state as rds
  except ImportError:
    return
  regs = list(mcore.MemorySpace).index(mcore.MemorySpace.REGS)
  def is_regs(key):  # HostAllocationKey, or a tuple (memory_space_id, ...) in 0.10.2
    return getattr(key, "memory_space_id", None) == regs
  for name in ("check_read", "check_write"):
    orig = getattr(rds.RaceDetectionState, name)
    def wrapped(self, *args, __orig=orig, **kw):
      if any(is_regs(a) for a in args) or any(is_regs(a) for a in kw.values()):
        return None
      return __orig(self, *args, **kw)
    setattr(rds.RaceDetectionState, name, wrapped)


def _patch_barrier_deallocate():
  from jax._src.pallas.mosaic_gpu.interpret import shared_memory as sm
  if hasattr(sm.Barrier, "observed_phases"):  # 0.12: already relaxed
    return
  def deallocate(self):
    with self.cv:
      self.ref_count -= 1
      if self.ref_count == 0 and self.arrivals_count != 0:
        raise ValueError(f"Barrier deallocated with {self.arrivals_count} arrivals pending.")
  sm.Barrier.deallocate = deallocate


def _patch_wgmma_callback_0102():
  """0.10.2's wgmma callback cannot read through plgpu.transpose_ref."""
  import numpy as np
  if "device_id" not in inspect.signature(gc.wgmma).parameters:
    return
  from jax._src.pallas.mosaic.interpret import utils as iu
  def read(sh, key, transforms, gtid, log):
    ts = tuple(t for t in transforms if not isinstance(t, gc.NOOP_TRANSFORMS))
    perm = None
    if ts and type(ts[-1]).__name__ == "TransposeTransform":
      perm, ts = ts[-1].permutation, ts[:-1]
    rng = iu.to_range(jax.tree.map(int, ts))
    x, _, _ = sh.get_buffer_content(key, rng, gtid, logging_info=log)
    return (x if perm is None else np.transpose(x, perm)), rng
  def wgmma(*, token, device_id, grid_point_coords, thread_id, acc_allocation_key_as_array,
            acc_transforms, acc_dtype, a_allocation_key_as_array, a_transforms,
            b_allocation_key_as_array, b_transforms, source_info=None):
    dev, tid = int(device_id), int(thread_id)
    K = gc.HostAllocationKey.from_array
    sh = gc._get_shared_memory(); gtid = sh.get_global_thread_id(dev, tid)
    log = iu.GPULoggingInfo(device_id=dev, thread_id=tid, source_info=source_info,
                            grid_point_coords=tuple(int(x) for x in grid_point_coords))
    a, _ = read(sh, K(a_allocation_key_as_array), a_transforms, gtid, log)
    b, _ = read(sh, K(b_allocation_key_as_array), b_transforms, gtid, log)
    acc, rng = read(sh, K(acc_allocation_key_as_array), acc_transforms, gtid, log)
    sh.store_buffer_content(K(acc_allocation_key_as_array), rng,
                            acc + np.matmul(a, b, dtype=acc_dtype), gtid, logging_info=log)
    return token
  gc.wgmma = wgmma


_pending = {}  # thread -> FIFO of clocks of wgmmas in flight

def _wgmma_retire(sh, thread, keep=0):
  q = _pending.get((id(sh), thread), [])
  done, q[:] = (q[:len(q) - keep], q[len(q) - keep:]) if keep else (q[:], [])
  if done:
    with sh.lock:
      for c in done: sh.clocks[thread].update(c)


def _patch_wgmma_async_races():
  if "thread" not in inspect.signature(gc.wgmma).parameters:
    return  # 0.10.2
  orig, orig_deref = gc.wgmma, gc.wgmma_accumulator_deref
  regs = list(mcore.MemorySpace).index(mcore.MemorySpace.REGS)
  K = gc.HostAllocationKey.from_array

  @gc.fail_on_exception
  def wgmma(*, token, mesh_location, thread, a_allocation_key_as_array, a_transforms,
            b_allocation_key_as_array, b_transforms, source_info=None, **kw):
    token = orig(token=token, mesh_location=mesh_location, thread=thread,
                 a_allocation_key_as_array=a_allocation_key_as_array, a_transforms=a_transforms,
                 b_allocation_key_as_array=b_allocation_key_as_array, b_transforms=b_transforms,
                 source_info=source_info, **kw)
    sh = gc._get_shared_memory()
    if sh.detect_races:
      sh.incr_clock(thread)
      clock = sh.get_clock(thread)
      clock.inc(sh.get_next_tma_thread_id())
      for key, tr in ((K(a_allocation_key_as_array), a_transforms),
                      (K(b_allocation_key_as_array), b_transforms)):
        if key.memory_space_id != regs:
          tr = jax.tree.map(int, gc._remove_noop_transforms(tr))
          gc.get_races().check_read(thread, clock.async_smem_clock.copy(), key,
                                    sh.access(key, tr), source_info=source_info)
      _pending.setdefault((id(sh), thread), []).append(clock)
    return token

  @gc.fail_on_exception
  def deref(*, thread, **kw):
    sh = gc._get_shared_memory()
    if sh.detect_races: _wgmma_retire(sh, thread, kw.get("wait_n") or 0)
    return orig_deref(thread=thread, **kw)
  gc.wgmma, gc.wgmma_accumulator_deref = wgmma, deref


def _wgmma_wait_callback(*, token, thread, n):
  sh = gc._get_shared_memory()
  if sh.detect_races: _wgmma_retire(sh, thread, n)
  return token

def _wait_n(eqn):
  return int(eqn.params["n"] if "n" in eqn.params else eqn.invars[0].val)

def _interpret_wgmma_wait(self, token, n):
  if not hasattr(self, "thread"): return token  # 0.10.2
  import functools
  from jax._src import callback
  return callback.io_callback(functools.partial(_wgmma_wait_callback, n=n),
                              gc.TOKEN_SHAPE_DTYPE, token=token, thread=self.thread)


_RED = {"add": "add", "min": "minimum", "max": "maximum", "umin": "minimum", "umax": "maximum"}
_red_lock = __import__("threading").RLock()

def _reduce_callback(*, token, src_allocation_key_as_array, src_transforms,
                     dst_allocation_key_as_array, dst_transforms, source_info,
                     reduction_op, thread=None, mesh_location=None, device_id=None,
                     grid_point_coords=None, thread_id=None):
  """SMEM -> GMEM reducing copy: done at once, under a lock, with no race check."""
  import numpy as np
  op = getattr(np, _RED[reduction_op])
  K = gc.HostAllocationKey.from_array
  sh = gc._get_shared_memory()
  src, dst = K(src_allocation_key_as_array), K(dst_allocation_key_as_array)
  ts = jax.tree.map(int, gc._remove_noop_transforms(src_transforms))
  td = jax.tree.map(int, gc._remove_noop_transforms(dst_transforms))
  if device_id is not None:  # 0.10.2
    from jax._src.pallas.mosaic.interpret import utils as iu
    th = sh.get_global_thread_id(int(device_id), int(thread_id))
    acc = lambda key, t: iu.to_range(t)
    kw = {}
  else:
    th, acc, kw = thread, sh.access, dict(increment_clock=False)
  with _red_lock:
    x, _, _ = sh.get_buffer_content(src, acc(src, ts), th, **kw)
    y, _, _ = sh.get_buffer_content(dst, acc(dst, td), th, **kw)
    x = np.asarray(x); y = np.asarray(y)
    sh.store_buffer_content(dst, acc(dst, td), op(y, x).astype(y.dtype), th, **kw)
  return token


def _patch_copy_smem_to_gmem(orig):
  from jax._src import callback
  from jax import lax
  def run(self, eqn, token, src, dst, *flat_args, src_transforms_treedef,
          dst_transforms_treedef, has_user_predicate, **params):
    if has_user_predicate:
      *flat_args, predicate = flat_args
      def do(token):
        t, _ = run(self, eqn, token, src, dst, *flat_args,
                   src_transforms_treedef=src_transforms_treedef,
                   dst_transforms_treedef=dst_transforms_treedef,
                   has_user_predicate=False, **params)
        return t
      return lax.cond(predicate, do, lambda t: t, token), []
    if params["reduction_op"] is None:
      return orig(self, eqn, token, src, dst, *flat_args,
                  src_transforms_treedef=src_transforms_treedef,
                  dst_transforms_treedef=dst_transforms_treedef,
                  has_user_predicate=False, **params)
    ts, td = jax.tree.unflatten(jax.tree_util.treedef_tuple(
        (src_transforms_treedef, dst_transforms_treedef)), flat_args)
    if hasattr(self, "mesh_location"):
      who = dict(mesh_location=self.mesh_location, thread=self.thread)
    else:
      who = dict(device_id=self.device_info.device_id, thread_id=self.thread_id,
                 grid_point_coords=self.grid_point_coords)
    import functools
    return callback.io_callback(
        functools.partial(_reduce_callback, source_info=eqn.source_info,
                          reduction_op=params["reduction_op"]),
        gc.TOKEN_SHAPE_DTYPE, token=token, src_allocation_key_as_array=src,
        src_transforms=ts, dst_allocation_key_as_array=dst, dst_transforms=td, **who), []
  return run


_installed = False
def install():
  global _installed
  if _installed: return
  _installed = True
  _patch_race_state(); _patch_barrier_deallocate(); _patch_wgmma_callback_0102()
  _patch_wgmma_async_races()
  src = textwrap.dedent(inspect.getsource(ji.JaxprInterpreter.interpret))
  lines, n = [], 0
  for ln in src.splitlines():
    if ln.strip() == "case lax.axis_index_p:":  # first case
      pad = ln[:len(ln) - len(ln.lstrip())]
      for name, stmt in _CASES:
        lines += [f"{pad}case _shim.{name}:", f"{pad}  {stmt}"]
      n += 1
    lines.append(ln)
  assert n == 1, "jax's GPU interpret mode changed: update this shim"
  g = dict(ji.__dict__)
  g["_shim"] = ns(run_state_p=discharge.run_state_p, gpu_load_p=gpu_primitives.load_p,
                  accumulator_store_p=gpu_primitives.wgmma_accumulator_store_p,
                  layout_cast_p=_find_layout_cast(), wgmma_wait_p=gpu_primitives.wgmma_wait_p, wait_n=_wait_n)
  exec(compile("\n".join(lines), __file__ + ":interpret", "exec"), g)
  orig = g["interpret"]
  def interpret(self, jaxpr, token, *args):
    if isinstance(jaxpr, _Body):
      return jaxpr.fn(token, *args)
    return orig(self, jaxpr, token, *args)
  J = ji.JaxprInterpreter
  J.interpret = interpret
  J._shim_run_state_p = _interpret_run_state_p
  J._shim_load_p = _interpret_load_p
  J._shim_accumulator_store = _interpret_accumulator_store
  J._shim_wgmma_wait = _interpret_wgmma_wait
  J._interpret_wgmma_ref_p = _patch_wgmma(J._interpret_wgmma_ref_p)
  J._interpret_copy_smem_to_gmem_p = _patch_copy_smem_to_gmem(J._interpret_copy_smem_to_gmem_p)
