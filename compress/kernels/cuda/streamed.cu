// y = x (Q + L1^T L2)^T for at most 8 TOKEN_TILES tokens, in one launch, on devices of compute capability 9.0 on.
//
// A block has consecutive tiles and takes R of them at a time; its warps share the columns out in stages of four chunks
// and add their sums in shared memory, in order. A warp reads a stage's inputs into registers once for all R tiles.
// Codes, scale codes and steps of a tile and stage, an item, pass through the warp's own ring in shared memory; a slot is
// filled anew as soon as it is in registers.
//
// With factors, a cluster of CLUSTER blocks computes x L2^T for itself, every block a part of the columns; they read each
// other's sums in shared memory, so nobody waits for blocks that may not be running.
//
// PAIRED blocks have the same tiles and every second 16 stages, and add their sums in the same way: half the inputs pass
// to every block.
//
// Launched programmatically it begins while the kernel before it in the stream still runs. Before `griddepcontrol.wait`
// only weights are read, which the caller knows to be complete; inputs are read and results written after it.

#ifndef STAGED
#define STAGED 1  // for comparisons
#endif
#ifndef CLUSTER
#define CLUSTER 8
#endif
#define BEFORE 64512  // bytes of shared memory before the table: sums, then inputs
#define RINGS 102400  // after it
#define AREA 4096     // of a warp, of those before the table: inputs of the next stage, then sums

__device__ __forceinline__ uint2 read_two(const u16* at) {
  uint2 v;
  asm volatile("ld.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
}
__device__ __forceinline__ uint4 read_four(const u16* at) {
  uint4 v;
  asm volatile("ld.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}
__device__ __forceinline__ void copy_16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_8(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ uint4 shared_four(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}
__device__ __forceinline__ uint2 shared_two(u32 at) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}
__device__ __forceinline__ u32 shared_short(u32 at) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
  return v;
}
__device__ __forceinline__ u32 shared_byte(u32 at) {
  u16 v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=h"(v) : "r"(at));
  return v;
}
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

__device__ __forceinline__ u32 rank_in_cluster() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ float4 read_of(u32 at, u32 rank) {
  float4 v;
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
}
__device__ __forceinline__ float read_one_of(u32 at, u32 rank) {
  float v;
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(there) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(u32 at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}

// An item in bytes: codes, steps of 16 rows a block, scale codes. What the rings leave: a warp's area, and with 2 bits 16 KB.
template <int BITS, int SCALE_BITS, int PER_BLOCK, int WARPS>
struct Item {
  static constexpr int BLOCKS = U / PER_BLOCK, WORDS = BITS == 4 || BITS == 2 ? 1 : 2;
  static constexpr int CODES = U * BITS * 64, STEPS = 64 * BLOCKS;
  static constexpr int SCALES = (2 * SCALE_BITS * BLOCKS + (SCALE_BITS == 3 ? 2 : 0) + 3) / 4;  // words
  static constexpr int BYTES = CODES + STEPS + ((SCALES * 4 + 15) & ~15);
  static constexpr int FIT = (RINGS - AREA - (BITS == 2 ? 16384 : 0)) / WARPS / BYTES, SLOTS = FIT < 8 ? FIT : 8;
  static constexpr int RING = SLOTS * BYTES;
};

// As two_scale_codes, from shared memory.
template <int SCALE_BITS>
__device__ __forceinline__ u32 scale_codes_at(u32 base, int g) {
  if (SCALE_BITS == 8) return shared_short(base + 2 * g);
  if (SCALE_BITS == 4) {
    u32 byte = shared_byte(base + g);
    return (byte & 15) | ((byte >> 4) << 8);
  }
  u32 pairs = shared_byte(base + (g >> 1)) >> (4 * (g & 1));
  u32 found = (pairs & 3) | (((pairs >> 2) & 3) << 8);
  if (SCALE_BITS == 3) {
    u32 high = shared_byte(base + 4 + (g >> 2)) >> (2 * (g & 3));
    found |= ((high & 1) << 2) | (((high >> 1) & 1) << 10);
  }
  return found;
}

// As fill_table, by 16 bytes. An entry of 2 bits is all four codes of a byte: the even octet's pair, then the odd one's.
template <int BITS, int WARPS>
__device__ __forceinline__ void fill_table_fast(u8* table, float mine, const float* from, int warp, int lane) {
  constexpr int LAST = (1 << BITS) - 1, AT_ONCE = BITS == 2 ? 2 : 4, LANES = 32 / AT_ONCE;
  int shift = BITS == 2 ? lane / 8 % 2 * 2 : 0;
#pragma unroll
  for (int i = 0; i < 256 / (AT_ONCE * WARPS); ++i) {
    int entry = AT_ONCE * (warp + i * WARPS) + lane / LANES;
    float low, high = 0.f;
    if (BITS == 8) {
      low = __ldg(from + entry);
    } else {
      low = __shfl_sync(0xffffffffu, mine, (entry >> shift) & 15 & LAST);
      high = __shfl_sync(0xffffffffu, mine, (entry >> (4 + shift)) & LAST);
    }
    u32 pair = bf16_pair(low, high);
    *reinterpret_cast<uint4*>(table + entry * 256 + (lane % LANES) * 16) = make_uint4(pair, pair, pair, pair);
  }
}

// Of 2 bits: the four pairs of two bytes; `selector` says where the first is.
__device__ __forceinline__ void look_up_bytes(u32 (&pairs)[4], u32 word, u32 selector, u32 entry) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    u32 at = __byte_perm(word, entry, selector + 16 * j);
    asm("ld.shared.b32 %0, [%1];" : "=r"(pairs[j]) : "r"(at));
    asm("ld.shared.b32 %0, [%1+128];" : "=r"(pairs[2 + j]) : "r"(at));
  }
}

// An item in registers: codes, steps and scale codes of this lane's two rows.
template <int BITS, int SCALE_BITS, int PER_BLOCK, int WARPS>
struct Held {
  using I = Item<BITS, SCALE_BITS, PER_BLOCK, WARPS>;
  uint2 words[U][I::WORDS];
  uint2 steps[I::BLOCKS];
  u32 scale_codes[I::BLOCKS];
};

// What a warp will fetch next; slots are filled in the order in which they are read.
template <int BITS, int SCALE_BITS, int WARPS, int STEP, int PER_BLOCK, bool EVEN>
struct Producer {
  using I = Item<BITS, SCALE_BITS, PER_BLOCK, WARPS>;
  u32 codes, scales;  // bytes before this lane's of the next item; a matrix has less than 4 GB
  int step;           // row times blocks, and block, of this lane's step
  int base, last, per, stage, r;

  __device__ __forceinline__ void place(const Matrix& m, int lane) {
    int tile = base + r;
    codes = (tile * m.chunks + stage * U) * (BITS * 64) + lane * 16;
    scales = (tile * m.blocks + stage * I::BLOCKS) * (2 * SCALE_BITS) + min(lane, I::SCALES - 1) * 4;
    step = (tile * 16 + (lane & 15)) * m.blocks + stage * I::BLOCKS + (I::BLOCKS > 1 ? lane >> 4 : 0);
  }
  // Where this lane's codes, step and scale codes go. Lanes that are left over do as others do: no branch.
  __device__ __forceinline__ void fill(
      const Matrix& m, u32 codes_to, u32 steps_to, u32 scales_to, int stages, int begin, int lane) {
    if (base < last) {
      const u8* from = reinterpret_cast<const u8*>(m.codes) + codes;
      int bytes = EVEN ? I::CODES : min(U, m.chunks - stage * U) * (BITS * 64);
#pragma unroll
      for (int k = 0; k < I::CODES; k += 512)
        if ((I::CODES % 512 == 0 && EVEN) || k + lane * 16 < bytes) copy_16(codes_to + k, from + k);
#pragma unroll
      for (int k = 0; k < I::BLOCKS; k += 2) {
        int at = step + k;
        if (!EVEN) {
          int block = min(stage * I::BLOCKS + (I::BLOCKS > 1 ? lane >> 4 : 0) + k, m.blocks - 1);
          at = min((base + r) * 16 + (lane & 15), m.rows - 1) * m.blocks + block;
        }
        copy_4(steps_to + k * 64, m.steps + (at >> m.shift));
      }
      u32 word = SCALE_BITS == 3 ? scales & ~3u : scales;
      if (EVEN || word < (u32)m.tiles * m.blocks * (2 * SCALE_BITS)) copy_4(scales_to, m.scale_codes + word);
      if (++r < per && base + r < last) {
        codes += m.chunks * (BITS * 64);
        scales += m.blocks * (2 * SCALE_BITS);
        step += m.blocks * 16;
      } else {
        r = 0;
        stage += STEP;
        if (stage >= stages) {
          stage = begin;
          base += per;
        }
        place(m, lane);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
};

template <int BITS, int SCALE_BITS, int TOKEN_TILES, int R, int WARPS, int PER_BLOCK, bool EVEN, bool LOW_RANK,
          bool PAIRED>
__global__ void __launch_bounds__(WARPS * 32, 1) streamed(
    const Matrix m, const u16* __restrict__ x, u16* __restrict__ y, int tokens, const u16* __restrict__ left,
    const u16* __restrict__ right, float* inner_sums, int rank) {
  extern __shared__ __align__(1024) u8 shared[];
  using I = Item<BITS, SCALE_BITS, PER_BLOCK, WARPS>;
  constexpr bool AHEAD = TOKEN_TILES == 1;
  constexpr int T = TOKEN_TILES * 8, GROUPS = 4, PART = TOKEN_TILES > 1 ? 2 : 4;  // of 16 ranks
  constexpr int FIT = 49152 / (WARPS * 64 * T), ROUND = R < FIT ? R : FIT, WIDTH = 16 * ROUND;
  constexpr int SUMS = LOW_RANK && WIDTH < 16 * PART ? 16 * PART : WIDTH;  // of a warp and token
  static_assert(WARPS * T * SUMS * 4 <= BEFORE, "sums");
  float* sums_at = reinterpret_cast<float*>(shared);
  int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int stages = (m.chunks + U - 1) / U;
  u32 start = (u32)__cvta_generic_to_shared(shared), table = table_address(shared);
  u32 entry = table | (lane * 4);
  u32 selector = 0x7604u | (32 * (t & 1));
  u8* table_at = shared + (table - start);
  u32 ring = table + 65536 + warp * I::RING;
  u32 codes_to = ring + lane * 16, steps_to = ring + I::CODES + (I::BLOCKS > 1 ? lane : lane & 15) * 4;
  u32 scales_to = ring + I::CODES + I::STEPS + min(lane, I::SCALES - 1) * 4;
  u32 words_at = ring + g * 8 + (BITS == 4 ? t * 64 : BITS == 8 ? t * 128 : (t >> 1) * 64);
  u32 steps_at = ring + I::CODES + g * 8, scales_at = ring + I::CODES + I::STEPS;
  if (SCALE_BITS == 8) scales_at += 2 * g;
  asm volatile("" : "+r"(codes_to), "+r"(steps_to), "+r"(scales_to));  // keep them in registers
  asm volatile("" : "+r"(words_at), "+r"(steps_at), "+r"(scales_at));

  constexpr int TEAM = PAIRED ? 2 : 1, STEP = TEAM * WARPS;
  int team = blockIdx.x / TEAM, teams = gridDim.x / TEAM, side = blockIdx.x % TEAM, begin = side * WARPS + warp;
  int each = m.tiles / teams, plain = teams - (m.tiles - each * teams), over = team - plain;
  int first = team * each + max(0, over), last = first + each + (over >= 0), per = last - first, height = per * 16;
  if (per > R) {
    int passes = (per + R - 1) / R;
    per = (per + passes - 1) / passes;
  }

  // The factors' first values are asked for before all else.
  int padded = (rank + 15) & ~15, chunks = (m.columns + 31) / 32, share = (chunks + CLUSTER - 1) / CLUSTER;
  int share_from = 0, share_to = 0;
  uint4 above[GROUPS], below[GROUPS];
  auto load_right = [&](int from, int i) {
    bool there = i < share_to && (EVEN || i * 32 + 8 * t < m.columns);
    const u16* at = right + 8 * t + i * 32;
#pragma unroll
    for (int h = 0; h < GROUPS; ++h) {
      above[h] = below[h] = make_uint4(0, 0, 0, 0);
      if (there && from + 16 * h < padded) {
        above[h] = __ldg(reinterpret_cast<const uint4*>(at + (size_t)min(from + 16 * h + g, rank - 1) * m.columns));
        below[h] = __ldg(reinterpret_cast<const uint4*>(at + (size_t)min(from + 16 * h + g + 8, rank - 1) * m.columns));
      }
    }
  };
  if (LOW_RANK) {
    share_from = rank_in_cluster() * share + warp;
    share_to = min((int)(rank_in_cluster() + 1) * share, chunks);
    load_right(0, share_from);
  }

  Producer<BITS, SCALE_BITS, WARPS, STEP, PER_BLOCK, EVEN> p;
  p.base = begin < stages ? first : last, p.last = last, p.per = per;
  p.stage = begin, p.r = 0;
  p.place(m, lane);
  float mine = BITS == 8 ? 0.f : __ldg(m.table + (lane & ((1 << BITS) - 1)));
  float offset = __ldg(m.offset);
  auto fill = [&](u32 slot) { p.fill(m, codes_to + slot, steps_to + slot, scales_to + slot, stages, begin, lane); };
#pragma unroll 1
  for (u32 slot = 0; slot < I::RING; slot += I::BYTES) fill(slot);
  if (LOW_RANK)
    for (int k = threadIdx.x; k < rank * (last - first); k += WARPS * 32) {
      int row = (first + k / rank) * 16;
      if (row < m.rows) prefetch(left + (size_t)(k % rank) * m.rows + row);
    }
  fill_table_fast<BITS, WARPS>(table_at, mine, m.table, warp, lane);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  // Where the sums of this block's columns lie for the cluster, by 16 bytes; where entries have gaps, in those.
  auto inner_at = [&](int i) {
    if (BITS == 2) return table + 65536 + WARPS * I::RING + AREA + i * 16;
    return table + (i >> 3) * 256 + 128 + (i & 7) * 16;
  };
  if (LOW_RANK) {
    const u16* rows[TOKEN_TILES];
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) rows[n] = x + (size_t)min(n * 8 + g, tokens - 1) * m.columns + 8 * t;
    for (int from = 0; from < padded; from += 16 * GROUPS) {
      float c[GROUPS][TOKEN_TILES][4] = {};
      if (from) load_right(from, share_from);
#pragma unroll 1
      for (int i = share_from; i < share_to; i += WARPS) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (EVEN || i * 32 + 8 * t < m.columns) v = read_four(rows[n] + i * 32);
#pragma unroll
          for (int h = 0; h < GROUPS; ++h) {
            add_product(c[h][n], above[h].x, below[h].x, above[h].y, below[h].y, v.x, v.y);
            add_product(c[h][n], above[h].z, below[h].z, above[h].w, below[h].w, v.z, v.w);
          }
        }
        if (i + WARPS < share_to) load_right(from, i + WARPS);
      }
#pragma unroll
      for (int part = 0; part < GROUPS; part += PART) {
        int begin = from + 16 * part;
        if (begin < padded) {
          __syncthreads();
#pragma unroll
          for (int h = 0; h < PART; ++h)
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                int token = n * 8 + 2 * t + (k & 1);
                if (token < tokens)
                  sums_at[(warp * tokens + token) * (16 * PART) + 16 * h + g + 8 * (k >> 1)] = c[part + h][n][k];
              }
          __syncthreads();
          for (int i = threadIdx.x; i < 16 * PART * tokens; i += WARPS * 32) {
            int at = begin + i % (16 * PART);
            if (at < padded) {
              float sum = 0;
#pragma unroll
              for (int w = 0; w < WARPS; ++w) sum += sums_at[w * tokens * (16 * PART) + i];
              at += i / (16 * PART) * padded;
              store_shared(inner_at(at >> 2) + 4 * (at & 3), sum);
            }
          }
        }
      }
    }
    cluster_arrive();
  }

  // Inputs of few tokens are copied once, every warp's own stages. Others are read where they are, or, of many tiles,
  // copied a stage ahead into the warp's area, which the last one's do not have before the table.
  constexpr bool SPLIT = BITS == 2;  // a lane has half of either octet of a word
  u32 own = SPLIT ? 16 * (t >> 1) + 4 * (t & 1) : 8 * t;
  int wide = m.columns + 32;
  u8* room = shared + WARPS * tokens * SUMS * 4;
  int ours = PAIRED ? height * tokens * 4 : 0;  // bytes of the sums of all tiles of a pair
  bool near = WARPS * tokens * SUMS * 4 + tokens * wide * 2 + ours <= BEFORE;
  if (near) {
    int in_row = COLUMNS / 8 * tokens;  // pieces of 8 columns
    for (int stage = begin; stage < stages; stage += STEP)
      for (int k = lane; k < in_row; k += 32) {
        int token = k / (COLUMNS / 8), column = stage * COLUMNS + k % (COLUMNS / 8) * 8;
        if (EVEN || column < m.columns)
          *reinterpret_cast<uint4*>(room + (token * wide + column) * 2) = read_four(x + (size_t)token * m.columns + column);
      }
  }
  static_assert(WARPS * AREA - 1024 <= BEFORE && T * WIDTH * 4 <= AREA - 1024, "areas");
  constexpr int STILL = I::SLOTS < 5 ? I::SLOTS - 1 : 4;  // groups of copies that may still be under way
  bool staged = STAGED && EVEN && !PAIRED && !near && per == last - first && per > STILL;
  int pitch = staged ? AREA / 4 : tokens * WIDTH;
  u32 area = (warp < WARPS - 1 ? start + warp * AREA : table + 65536 + WARPS * I::RING) + lane * 16;
  const u16* inputs[TOKEN_TILES];  // columns of a fragment's tokens that are not there are never stored
#pragma unroll
  for (int n = 0; n < TOKEN_TILES; ++n) {
    int token = min(n * 8 + g, tokens - 1);
    inputs[n] = near ? reinterpret_cast<const u16*>(room) + token * wide : x + (size_t)token * m.columns;
    inputs[n] += own;
  }
  __syncthreads();
  asm volatile("" : "+r"(entry)::"memory");  // no look-up before the table is there

  // Takes the next item of the ring, of a tile and stage, into registers, and has its slot filled. Of few tokens there
  // are registers to take one while another is computed.
  // A warp multiplies 16 ranks; where there are fewer than warps, several share the tiles of the same ones.
  int groups = padded / 16, power = groups > 8 ? 0 : groups > 4 ? 1 : groups > 2 ? 2 : groups > 1 ? 3 : 4;
  int group = warp >> power, sharing = (1 << power) - 1, lead = warp & sharing;
  u32 high[TOKEN_TILES][2], low[TOKEN_TILES][2];  // 16 inner sums of a token, in two parts
  auto gather = [&] {
    if (group < groups) {
      int from = group * 16 + 4 * t;
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n) {
        float f[4] = {};
        int token = n * 8 + g;
        u32 at = inner_at((min(token, tokens - 1) * padded + from) >> 2);
#pragma unroll
        for (u32 s = 0; s < CLUSTER; ++s) {
          float4 v = read_of(at, s);
          f[0] += v.x, f[1] += v.y, f[2] += v.z, f[3] += v.w;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (from + k >= rank) f[k] = 0.f;
        if (blockIdx.x == gridDim.x - 1 && lead == 0 && token < tokens)
          for (int k = 0; k < 4; ++k)
            if (from + k < rank) inner_sums[(size_t)token * rank + from + k] = f[k];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          high[n][h] = bf16_pair(f[2 * h], f[2 * h + 1]);
          float rest = f[2 * h] - low_of(high[n][h]), also = f[2 * h + 1] - high_of(high[n][h]);
          low[n][h] = bf16_pair(rest == rest ? rest : 0.f, also == also ? also : 0.f);  // inf less inf
        }
      }
    }
  };
  // Once all blocks of the cluster have their sums, which have time until the second stage. Many tokens' stay there until
  // they are needed, for want of registers.
  bool joined = false;
  auto join = [&] {
    joined = true;
    cluster_wait();
    if (AHEAD) gather();
    if (AHEAD) cluster_arrive();
  };
  u32 slot = 0;  // its place in the ring
  auto take = [&](Held<BITS, SCALE_BITS, PER_BLOCK, WARPS>& item, int tile, int stage) {
    asm volatile("cp.async.wait_group %0;" ::"n"(I::SLOTS - 1) : "memory");
    __syncwarp();
#pragma unroll
    for (int u = 0; u < U; ++u) {
      u32 at = words_at + slot + u * (BITS * 64);
      item.words[u][0] = shared_two(at);
      if (BITS == 8) item.words[u][I::WORDS - 1] = shared_two(at + 64);
      if (BITS == 3) item.words[u][I::WORDS - 1] = shared_two(at + 128 - (t >> 1) * 64);
    }
    int odd = SCALE_BITS == 3 ? (int)(((size_t)tile * m.blocks + stage * I::BLOCKS) & 1) * 2 : 0;
#pragma unroll
    for (int block = 0; block < I::BLOCKS; ++block) {
      item.steps[block] = shared_two(steps_at + slot + block * 64);
      item.scale_codes[block] =
          scale_codes_at<SCALE_BITS>(scales_at + slot + odd + block * (2 * SCALE_BITS), SCALE_BITS == 8 ? 0 : g);
    }
    __syncwarp();
    fill(slot);
    slot += I::BYTES;
    if (slot == I::RING) slot = 0;
  };
  Held<BITS, SCALE_BITS, PER_BLOCK, WARPS> held[2];
  if (AHEAD && begin < stages && first < last) take(held[0], first, begin);
  uint4 b[TOKEN_TILES][U];
  for (int base = first; base < last; base += per) {
    int count = min(per, last - base);
    float acc[R][TOKEN_TILES][4] = {};
    for (int stage = begin; stage < stages; stage += STEP) {
      if (LOW_RANK && !joined && stage != begin) join();
      bool stay = PAIRED && base != first && begin + STEP >= stages;  // of a warp's only stage
      if (!stay) {
        bool copied = staged && stage != begin;
        if (copied) asm volatile("cp.async.wait_group %0;" ::"n"(STILL) : "memory");
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
          for (int u = 0; u < U; ++u) {
            int column = stage * COLUMNS + u * 32;
            const u16* at = inputs[n] + column;
            if (copied) {
              b[n][u] = shared_four(area + (n * U + u) * 512);
            } else if (SPLIT) {
              uint2 even = make_uint2(0, 0), odd = even;
              if (EVEN || column + (int)own < m.columns) even = read_two(at);
              if (EVEN || column + (int)own + 8 < m.columns) odd = read_two(at + 8);
              b[n][u] = make_uint4(even.x, even.y, odd.x, odd.y);
            } else {
              b[n][u] = make_uint4(0, 0, 0, 0);
              if (EVEN || column + (int)own < m.columns) b[n][u] = read_four(at);
            }
          }
      }
      if (staged && stage + STEP < stages) {  // with the next item's copies
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
          for (int u = 0; u < U; ++u) {
            const u16* at = inputs[n] + (stage + STEP) * COLUMNS + u * 32;
            u32 to = area + (n * U + u) * 512;
            if (SPLIT) {
              copy_8(to, at);
              copy_8(to + 8, at + 8);
            } else {
              copy_16(to, at);
            }
          }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r < count) {
          auto& now = held[AHEAD ? r & 1 : 0];
          if (AHEAD) {
            bool same = r + 1 < count, on = stage + STEP < stages;
            take(held[~r & 1], same ? base + r + 1 : on ? base : base + per, same ? stage : on ? stage + STEP : begin);
          } else {
            take(now, base + r, stage);
          }
#pragma unroll
          for (int block = 0; block < I::BLOCKS; ++block) {
            float sums[TOKEN_TILES][4];
#pragma unroll
            for (int c = 0; c < PER_BLOCK; ++c) {
              int u = block * PER_BLOCK + c;
              u32 a[4], d[4];
              if (BITS == 2) {
                look_up_bytes(a, now.words[u][0].x, selector, entry);
                look_up_bytes(d, now.words[u][0].y, selector, entry);
              } else {
                look_up<BITS>(a, now.words[u][0].x, now.words[u][I::WORDS - 1].x, t, entry);
                look_up<BITS>(d, now.words[u][0].y, now.words[u][I::WORDS - 1].y, t, entry);
              }
#pragma unroll
              for (int n = 0; n < TOKEN_TILES; ++n) {
                if (c == 0)
                  product(sums[n], a[0], d[0], a[1], d[1], b[n][u].x, b[n][u].y);
                else
                  add_product(sums[n], a[0], d[0], a[1], d[1], b[n][u].x, b[n][u].y);
                add_product(sums[n], a[2], d[2], a[3], d[3], b[n][u].z, b[n][u].w);
              }
            }
            float scales[2] = {offset + (float)(now.scale_codes[block] & 255) * __uint_as_float(now.steps[block].x),
                               offset + (float)(now.scale_codes[block] >> 8) * __uint_as_float(now.steps[block].y)};
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
              for (int k = 0; k < 4; ++k) acc[r][n][k] += sums[n][k] * scales[k >> 1];
          }
        }
      }
      if (AHEAD && (count & 1)) held[0] = held[1];
    }
    if (LOW_RANK) {
      if (!joined) join();
      if (!AHEAD) gather();
      if (group < groups) {
        int from = group * 16 + 4 * t, row = base * 16 + 2 * g;
        asm volatile("" : "+r"(from), "+r"(row));  // addresses are not worth registers all along
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (r < count && r % TEAM == side && (r / TEAM & sharing) == lead) {
            u32 factor[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              factor[k] = 0;
              if (from + k < rank && row + r * 16 < m.rows)
                factor[k] = __ldg(reinterpret_cast<const u32*>(left + (size_t)(from + k) * m.rows + row + r * 16));
            }
            u32 a0 = __byte_perm(factor[0], factor[1], 0x5410), a1 = __byte_perm(factor[0], factor[1], 0x7632);
            u32 a2 = __byte_perm(factor[2], factor[3], 0x5410), a3 = __byte_perm(factor[2], factor[3], 0x7632);
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
              add_product(acc[r][n], a0, a1, a2, a3, high[n][0], high[n][1]);
              add_product(acc[r][n], a0, a1, a2, a3, low[n][0], low[n][1]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int from = 0; from < R; from += ROUND) {
      if (from < count) {
        if (from || base != first) __syncthreads();
#pragma unroll
        for (int r = from; r < from + ROUND && r < R; ++r)
#pragma unroll
          for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              int token = n * 8 + 2 * t + (k & 1);
              if (token < tokens)
                sums_at[warp * pitch + token * WIDTH + (r - from) * 16 + 2 * g + (k >> 1)] = acc[r][n][k];
            }
        __syncthreads();
        for (int i = threadIdx.x; i < WIDTH * tokens; i += WARPS * 32) {
          int row = (base + from) * 16 + i % WIDTH;
          if (row < (base + count) * 16 && (EVEN || row < m.rows)) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += sums_at[w * pitch + i];
            if (PAIRED)
              store_shared(start + BEFORE - ours + (i / WIDTH * height + row - first * 16) * 4, sum);
            else
              y[(size_t)(i / WIDTH) * m.rows + row] = (u16)bf16_pair(sum, 0.f);
          }
        }
      }
    }
  }
  if (LOW_RANK && !joined) join();
  if (PAIRED) {
    if (LOW_RANK && AHEAD) cluster_wait();
    cluster_arrive();
    cluster_wait();
    u32 pair = rank_in_cluster() & ~1u;
    for (int i = side * (WARPS * 32) + threadIdx.x; i < height * tokens; i += STEP * 32) {
      int row = first * 16 + i % height;
      if (EVEN || row < m.rows) {
        u32 at = start + BEFORE - ours + i * 4;
        float sum = read_one_of(at, pair) + read_one_of(at, pair + 1);
        y[(size_t)(i / height) * m.rows + row] = (u16)bf16_pair(sum, 0.f);
      }
    }
  }
  if (PAIRED || LOW_RANK) {
    if (PAIRED || !AHEAD) cluster_arrive();
    cluster_wait();  // no block ends while others may read its sums
  }
}
