// y = x (Q + L1^T L2)^T for at most 8 TOKEN_TILES tokens, in one launch; every warp streams its codes through a ring.
//
// A block has consecutive tiles and takes R of them at a time; its warps share the columns out in stages of four chunks.
// A warp reads a stage's inputs into registers once for all R tiles. Codes, scale codes and steps of a tile and stage,
// an item, lie in a slot of the warp's own ring; a slot is filled anew as soon as it is in registers.

template <int BITS, int SCALE_BITS, int TOKEN_TILES, int R, int WARPS, int PER_BLOCK, bool EVEN, bool LOW_RANK>
__global__ void __launch_bounds__(WARPS * 32, 1) few_tokens(
    const Matrix m, const u16* __restrict__ x, u16* __restrict__ y, int tokens, int each, const u16* __restrict__ left,
    const u16* __restrict__ right, float* inner, float* inner_sums, int rank, int* flags) {
  extern __shared__ __align__(1024) u8 shared[];
  using I = Item<BITS, SCALE_BITS, PER_BLOCK>;
  constexpr int T = TOKEN_TILES * 8;
  constexpr int FIT = SUMS / (WARPS * 64 * T), ROUND = R < FIT ? R : FIT, WIDTH = 16 * ROUND;
  float* sums_at = reinterpret_cast<float*>(shared);
  int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  int stages = (m.chunks + U - 1) / U;
  u32 start = (u32)__cvta_generic_to_shared(shared), table = table_address(shared), entry = table | (lane * 4);
  u8* table_at = shared + (table - start);
  u32 ring = table + 65536 + warp * RING;
  const u8* ring_at = table_at + 65536 + warp * RING;

  // The first blocks have the units of the low-rank part, the last ones the tiles that are left over.
  int plain = gridDim.x - (m.tiles - each * gridDim.x), over = (int)blockIdx.x - plain;
  int first = blockIdx.x * each + max(0, over), last = first + each + (over >= 0), per = last - first;
  if (per > R) {
    int passes = (per + R - 1) / R;
    per = (per + passes - 1) / passes;
  }
  Producer<BITS, SCALE_BITS, WARPS, PER_BLOCK, EVEN> p;
  p.base = warp < stages ? first : last, p.last = last, p.per = per, p.count = min(per, last - first);
  p.stage = warp, p.r = 0;
  p.place(m, lane);
  constexpr int LAST = BITS == 8 ? 255 : (1 << BITS) - 1;
  float mine = BITS == 8 ? 0.f : __ldg(m.table + (lane & LAST));
  float offset = __ldg(m.offset);
#pragma unroll 1
  for (int slot = 0; slot < I::SLOTS; ++slot) p.fill(m, ring + slot * I::BYTES, stages, warp, lane);
  if (PRE) {
    size_t bytes = (size_t)m.chunks * (BITS * 64), begin = first * bytes, end = last * bytes;
    for (size_t at = begin + threadIdx.x * 4096; at < end; at += WARPS * 32 * 4096)
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(reinterpret_cast<const u8*>(m.codes) + at),
                   "r"((u32)min((size_t)4096, end - at))
                   : "memory");
  }

#if RANK_UNITS
  int padded = (rank + 15) & ~15, units = padded / 16 * SHARES;
  int chunks = (m.columns + 31) / 32, each_share = (chunks + SHARES - 1) / SHARES;
  if (LOW_RANK) {
    int unit = blockIdx.x, i = unit % SHARES * each_share + warp;
    if (unit < units && i * 32 + 8 * t < m.columns) {
      prefetch(right + (size_t)min(unit / SHARES * 16 + g, rank - 1) * m.columns + 8 * t + i * 32);
      prefetch(right + (size_t)min(unit / SHARES * 16 + g + 8, rank - 1) * m.columns + 8 * t + i * 32);
    }
#else
  int padded = (rank + 15) & ~15, chunks = (m.columns + 31) / 32, each_share = (chunks + SHARES - 1) / SHARES;
  if (LOW_RANK) {
    int i = blockIdx.x * each_share + warp;
    if (blockIdx.x < SHARES && i * 32 + 8 * t < m.columns)
      for (int row = g; row < rank; row += 8) prefetch(right + (size_t)row * m.columns + 8 * t + i * 32);
#endif
    for (int k = threadIdx.x; k < rank * (last - first); k += WARPS * 32) {
      int row = (first + k / rank) * 16;
      if (row < m.rows) prefetch(left + (size_t)(k % rank) * m.rows + row);
    }
  }
  fill_table_fast<BITS, WARPS>(table_at, mine, m.table, warp, lane);
  if (PDL) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  }
  const u16* inputs[TOKEN_TILES];  // columns of a fragment's tokens that are not there are never stored
#pragma unroll
  for (int n = 0; n < TOKEN_TILES; ++n) inputs[n] = x + (size_t)min(n * 8 + g, tokens - 1) * m.columns + 8 * t;

  if (LOW_RANK) {
    float* scratch = sums_at;
#if RANK_UNITS
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      int from = unit / SHARES * 16, share = unit % SHARES;
      float c[TOKEN_TILES][4] = {};
      const u16* above = right + (size_t)min(from + g, rank - 1) * m.columns + 8 * t;
      const u16* below = right + (size_t)min(from + g + 8, rank - 1) * m.columns + 8 * t;
      for (int i = share * each_share + warp; i < min((share + 1) * each_share, chunks); i += WARPS) {
        bool there = EVEN || i * 32 + 8 * t < m.columns;
        uint4 a = make_uint4(0, 0, 0, 0), b = a;
        if (there) {
          a = __ldg(reinterpret_cast<const uint4*>(above + i * 32));
          b = __ldg(reinterpret_cast<const uint4*>(below + i * 32));
        }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (there) v = read_input(inputs[n] + i * 32);
          add_product(c[n], a.x, b.x, a.y, b.y, v.x, v.y);
          add_product(c[n], a.z, b.z, a.w, b.w, v.z, v.w);
        }
      }
      __syncthreads();
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) scratch[(warp * T + n * 8 + 2 * t + (k & 1)) * 16 + g + 8 * (k >> 1)] = c[n][k];
      __syncthreads();
      for (int i = threadIdx.x; i < 16 * tokens; i += WARPS * 32) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += scratch[w * T * 16 + i];
        __stcg(inner + ((size_t)share * tokens + i / 16) * padded + from + i % 16, sum);
#else
    constexpr int GROUPS = TOKEN_TILES > 1 ? 2 : 4;  // of 16 ranks, at a time
    for (int share = blockIdx.x; share < SHARES; share += gridDim.x) {
      for (int from = 0; from < padded; from += 16 * GROUPS) {
        float c[GROUPS][TOKEN_TILES][4] = {};
#pragma unroll 1
        for (int i = share * each_share + warp; i < min((share + 1) * each_share, chunks); i += WARPS) {
          bool there = EVEN || i * 32 + 8 * t < m.columns;
          uint4 v[TOKEN_TILES];
#pragma unroll
          for (int n = 0; n < TOKEN_TILES; ++n) {
            v[n] = make_uint4(0, 0, 0, 0);
            if (there) v[n] = read_input(inputs[n] + i * 32);
          }
#pragma unroll
          for (int h = 0; h < GROUPS; ++h) {
            uint4 a = make_uint4(0, 0, 0, 0), b = a;
            if (there && from + 16 * h < padded) {
              const u16* at = right + 8 * t + i * 32;
              a = __ldg(reinterpret_cast<const uint4*>(at + (size_t)min(from + 16 * h + g, rank - 1) * m.columns));
              b = __ldg(reinterpret_cast<const uint4*>(at + (size_t)min(from + 16 * h + g + 8, rank - 1) * m.columns));
            }
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
              add_product(c[h][n], a.x, b.x, a.y, b.y, v[n].x, v[n].y);
              add_product(c[h][n], a.z, b.z, a.w, b.w, v[n].z, v[n].w);
            }
          }
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < GROUPS; ++h)
#pragma unroll
          for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
            for (int k = 0; k < 4; ++k)
              scratch[(warp * T + n * 8 + 2 * t + (k & 1)) * (16 * GROUPS) + 16 * h + g + 8 * (k >> 1)] = c[h][n][k];
        __syncthreads();
        for (int i = threadIdx.x; i < 16 * GROUPS * tokens; i += WARPS * 32) {
          int at = from + i % (16 * GROUPS);
          if (at < padded) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += scratch[w * T * (16 * GROUPS) + i];
            __stcg(inner + ((size_t)share * tokens + i / (16 * GROUPS)) * padded + at, sum);
          }
        }
#endif
      }
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(flags, 1);
    }
  }
  __syncthreads();
  asm volatile("" : "+r"(entry)::"memory");  // no look-up before the table is there

  bool ready = !LOW_RANK;
  u32 high[TOKEN_TILES][2], low[TOKEN_TILES][2];  // this warp's 16 inner sums of a token, in two parts
  bool multiplies = LOW_RANK && warp * 16 < padded;
  u32 slot = 0;  // its place in the ring
  for (int base = first; base < last; base += per) {
    int count = min(per, last - base);
    float acc[R][TOKEN_TILES][4] = {};
#if RANK_UNITS
    for (int stage = warp; stage < stages; stage += WARPS) {
#else
    bool added = !LOW_RANK;
    for (int stage = warp;; stage += WARPS) {
      // The low-rank part before the last of several stages, so that memory has something to do meanwhile.
      if (!added && (stage >= stages || (stage != warp && stage + WARPS >= stages))) {
        added = true;
        if (!ready && multiplies) {
          ready = true;
          if (lane == 0) {
            int seen, polls = 0;
            do {
              asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(flags) : "memory");
              if (++polls > LIMIT) __trap();
            } while (seen < SHARES);
          }
          __syncwarp();
          {
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
              float f[4] = {};
              int token = n * 8 + g, from = warp * 16 + 4 * t;
#pragma unroll
              for (int share = 0; share < SHARES; ++share) {
                const float* at = inner + ((size_t)share * tokens + min(token, tokens - 1)) * padded + from;
                float4 v = __ldcg(reinterpret_cast<const float4*>(at));
                f[0] += v.x, f[1] += v.y, f[2] += v.z, f[3] += v.w;
              }
#pragma unroll
              for (int k = 0; k < 4; ++k)
                if (from + k >= rank) f[k] = 0.f;
              if (blockIdx.x == 0 && token < tokens)
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
        }
        if (multiplies) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            if (r < count) {
              u32 factor[4];
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                int at = warp * 16 + 4 * t + k, row = (base + r) * 16 + 2 * g;
                factor[k] = 0;
                if (at < rank && row < m.rows)
                  factor[k] = __ldg(reinterpret_cast<const u32*>(left + (size_t)at * m.rows + row));
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
      if (stage >= stages) break;
#endif
      uint4 b[TOKEN_TILES][U];
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
        for (int u = 0; u < U; ++u) {
          b[n][u] = make_uint4(0, 0, 0, 0);
          if (EVEN || (stage * U + u) * 32 + 8 * t < m.columns)
            b[n][u] = read_input(inputs[n] + stage * COLUMNS + u * 32);
        }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r < count) {
          const u8* at = ring_at + slot;
          asm volatile("cp.async.wait_group %0;" ::"n"(I::SLOTS - 1) : "memory");
          __syncwarp();
          uint2 words[U][I::WORDS];
#pragma unroll
          for (int u = 0; u < U; ++u) {
            const u8* of = at + u * (BITS * 64) + g * 8;
            if (BITS == 4) {
              words[u][0] = *reinterpret_cast<const uint2*>(of + t * 64);
            } else if (BITS == 8) {
              words[u][0] = *reinterpret_cast<const uint2*>(of + t * 128);
              words[u][I::WORDS - 1] = *reinterpret_cast<const uint2*>(of + t * 128 + 64);
            } else {
              words[u][0] = *reinterpret_cast<const uint2*>(of + (t >> 1) * 64);
              if (BITS == 3) words[u][I::WORDS - 1] = *reinterpret_cast<const uint2*>(of + 128);
            }
          }
          float scales[I::BLOCKS][2];
          int odd = SCALE_BITS == 3 ? (int)(((size_t)(base + r) * m.blocks + stage * I::BLOCKS) & 1) * 2 : 0;
#pragma unroll
          for (int block = 0; block < I::BLOCKS; ++block) {
            float2 steps = *reinterpret_cast<const float2*>(at + I::CODES + block * 64 + g * 8);
            u32 codes = scale_codes_at<SCALE_BITS>(at + I::CODES + I::STEPS + odd + block * (2 * SCALE_BITS), g);
            scales[block][0] = offset + (float)(codes & 255) * steps.x;
            scales[block][1] = offset + (float)(codes >> 8) * steps.y;
          }
          __syncwarp();
          p.fill(m, ring + slot, stages, warp, lane);
          slot += I::BYTES;
          if (slot == I::SLOTS * I::BYTES) slot = 0;
#pragma unroll
          for (int block = 0; block < I::BLOCKS; ++block) {
            float sums[TOKEN_TILES][4];
#pragma unroll
            for (int c = 0; c < PER_BLOCK; ++c) {
              int u = block * PER_BLOCK + c;
              u32 a[4], d[4];
              look_up<BITS>(a, words[u][0].x, words[u][I::WORDS - 1].x, t, entry);
              look_up<BITS>(d, words[u][0].y, words[u][I::WORDS - 1].y, t, entry);
#pragma unroll
              for (int n = 0; n < TOKEN_TILES; ++n) {
                if (c == 0)
                  product(sums[n], a[0], d[0], a[1], d[1], b[n][u].x, b[n][u].y);
                else
                  add_product(sums[n], a[0], d[0], a[1], d[1], b[n][u].x, b[n][u].y);
                add_product(sums[n], a[2], d[2], a[3], d[3], b[n][u].z, b[n][u].w);
              }
            }
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
              for (int k = 0; k < 4; ++k) acc[r][n][k] += sums[n][k] * scales[block][k >> 1];
          }
        }
      }
    }
#if RANK_UNITS
    if (!ready) {
      ready = true;
      if (lane == 0) {
        int seen, polls = 0;
        do {
          asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(flags) : "memory");
          if (++polls > LIMIT) __trap();
        } while (seen < units);
      }
      __syncwarp();
      if (multiplies) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
          float f[4] = {};
          int token = n * 8 + g, from = warp * 16 + 4 * t;
#pragma unroll
          for (int share = 0; share < SHARES; ++share) {
            const float* at = inner + ((size_t)share * tokens + min(token, tokens - 1)) * padded + from;
            float4 v = __ldcg(reinterpret_cast<const float4*>(at));
            f[0] += v.x, f[1] += v.y, f[2] += v.z, f[3] += v.w;
          }
#pragma unroll
          for (int k = 0; k < 4; ++k)
            if (from + k >= rank) f[k] = 0.f;
          if (blockIdx.x == 0 && token < tokens)
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
    }
    if (multiplies) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r < count) {
          u32 factor[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            int at = warp * 16 + 4 * t + k, row = (base + r) * 16 + 2 * g;
            factor[k] = 0;
            if (at < rank && row < m.rows)
              factor[k] = __ldg(reinterpret_cast<const u32*>(left + (size_t)at * m.rows + row));
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
#endif
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
              if (token < tokens) sums_at[(warp * T + token) * WIDTH + (r - from) * 16 + 2 * g + (k >> 1)] = acc[r][n][k];
            }
        __syncthreads();
        for (int i = threadIdx.x; i < WIDTH * tokens; i += WARPS * 32) {
          int row = (base + from) * 16 + i % WIDTH;
          if (row < (base + count) * 16 && (EVEN || row < m.rows)) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += sums_at[w * T * WIDTH + i];
            y[(size_t)(i / WIDTH) * m.rows + row] = (u16)bf16_pair(sum, 0.f);
          }
        }
      }
    }
  }
  if (LOW_RANK) {
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(flags + 1, 1) == (int)gridDim.x - 1) {
      flags[0] = 0;
      flags[1] = 0;
      __threadfence();
    }
  }
}
