// y = x (Q + L1^T L2)^T for at most 8 TOKEN_TILES tokens, in one launch, on devices of compute capability 9.0 on.
//
// A block has consecutive tiles and takes R of them at a time; its warps share the columns out in stages of four chunks
// and add their sums in shared memory, in order. A warp reads a stage's inputs into registers once for all R tiles.
// Codes, scale codes and steps of a tile and stage, an item, pass through the warp's own ring in shared memory; a slot is
// filled anew as soon as it is in registers.
//
// With factors, every block has four warps more. These compute x L2^T in units of 16 ranks and a share of the columns,
// add the shares when all units are done, and multiply by L1 for their block: one more sum beside those of the other
// warps, which stream meanwhile. Units are taken, not assigned, and who waits takes more: so nobody waits for a block
// that does not run. `flags`: units done, blocks done, units taken; zero before and after, and not those of the launch
// ahead in the stream.
//
// Launched programmatically it begins while the kernel before it in the stream still runs. Before `griddepcontrol.wait`
// units are taken and only weights are read, which the caller knows to be complete; inputs are read and results written
// after it.

#define POLLS 256     // after which who waits looks whether a unit was left
#define RING 6400     // bytes of a warp, after the table
// Bytes before the table: 17 places, 6 tiles of 8 tokens; of 16 tokens and with factors 2, for inner sums follow, 4 bytes
// each of up to 256 of a token.
#define SUMS (T == 8 || PLACES == WARPS ? 52224 : 34816)
#define MORE 4        // warps of the low-rank part
#define MOST_SLOTS 8  // of a ring

__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Of all threads, wherever in the code they are.
__device__ __forceinline__ void barrier() { asm volatile("bar.sync 0;" ::: "memory"); }
// From here on a thread has so many. A block of 640 begins with 96 each; what 128 give up is what 512 may have.
#define FEWER 64
#define FURTHER 104
template <int COUNT>
__device__ __forceinline__ void registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL)
  if (COUNT < 96)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
  else
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// What a warp will fetch next; slots are filled in the order in which they are read.
template <int BITS, int SCALE_BITS, int WARPS, int PER_BLOCK, bool EVEN>
struct Producer {
  using I = Item<BITS, SCALE_BITS, PER_BLOCK>;
  const u8* codes;  // of the next item, this lane's
  const u8* scales;
  int step;  // row times blocks, and block, of this lane's step
  int base, last, per, count, stage, r;

  __device__ __forceinline__ void place(const Matrix& m, int lane) {
    int tile = base + r;
    codes = reinterpret_cast<const u8*>(m.codes) + ((size_t)tile * m.chunks + stage * U) * (BITS * 64);
    codes += lane * 16;
    size_t begin = ((size_t)tile * m.blocks + stage * I::BLOCKS) * (2 * SCALE_BITS);
    scales = m.scale_codes + begin + lane * 4;
    step = (tile * 16 + (lane & 15)) * m.blocks + stage * I::BLOCKS + (lane >> 4);
  }
  __device__ __forceinline__ void fill(const Matrix& m, u32 to, int stages, int warp, int lane) {
    if (base < last) {
      u32 bytes = EVEN ? I::CODES : min(U, m.chunks - stage * U) * (BITS * 64);
#pragma unroll
      for (int k = 0; k < I::CODES; k += 512)
        if ((I::CODES % 512 == 0 && EVEN) || k + lane * 16 < bytes) copy_16(to + k + lane * 16, codes + k);
#pragma unroll
      for (int k = 0; k < I::BLOCKS; k += 2) {
        int at = step + k;
        if (!EVEN) {
          int block = min(stage * I::BLOCKS + (lane >> 4) + k, m.blocks - 1);
          at = min((base + r) * 16 + (lane & 15), m.rows - 1) * m.blocks + block;
        }
        if (I::BLOCKS > 1 || lane < 16) copy_4(to + I::CODES + k * 64 + lane * 4, m.steps + (at >> m.shift));
      }
      size_t place_of = reinterpret_cast<size_t>(scales);
      const u8* word = SCALE_BITS == 3 ? reinterpret_cast<const u8*>(place_of & ~(size_t)3) : scales;
      if (lane < I::SCALES && ((EVEN && SCALE_BITS != 3) || word < m.scale_codes + (size_t)m.tiles * m.blocks * (2 * SCALE_BITS)))
        copy_4(to + I::CODES + I::STEPS + lane * 4, word);
      if (++r < count) {
        codes += m.chunks * (BITS * 64);
        scales += m.blocks * (2 * SCALE_BITS);
        step += m.blocks * 16;
      } else {
        r = 0;
        stage += WARPS;
        if (stage >= stages) {
          stage = warp;
          base += per;
          count = min(per, last - base);
        }
        place(m, lane);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
};

__device__ __forceinline__ int take_unit(int* flags, int lane) {
  int unit = 0;
  if (lane == 0) unit = atomicAdd(flags + 2, 1);
  return __shfl_sync(0xffffffffu, unit, 0);
}

// Units of x L2^T from `unit` on, as long as there are any and until all are done; for a warp.
template <int TOKEN_TILES, bool EVEN>
__device__ __forceinline__ void inner_products(
    const u16* const (&inputs)[TOKEN_TILES], int columns, int tokens, const u16* right, float* inner, int rank,
    int padded, int shares, int unit, int* flags, int lane) {
  int g = lane >> 2, t = lane & 3, units = padded / 16 * shares;
  int chunks = (columns + 31) / 32;
  for (int done = 0;;) {
    if (unit < units) {
      int from = unit / shares * 16, share = unit % shares;
      float c[TOKEN_TILES][4] = {};
      const u16* above = right + (size_t)min(from + g, rank - 1) * columns + 8 * t;
      const u16* below = right + (size_t)min(from + g + 8, rank - 1) * columns + 8 * t;
#pragma unroll 4
      for (int i = share * chunks / shares; i < (share + 1) * chunks / shares; ++i) {
        bool there = EVEN || i * 32 + 8 * t < columns;
        uint4 a = make_uint4(0, 0, 0, 0), b = a;
        if (there) {
          a = read_input(above + i * 32);  // a factor, which is read after the wait too
          b = read_input(below + i * 32);
        }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (there) v = read_input(inputs[n] + i * 32);
          add_product(c[n], a.x, b.x, a.y, b.y, v.x, v.y);
          add_product(c[n], a.z, b.z, a.w, b.w, v.z, v.w);
        }
      }
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          int token = n * 8 + 2 * t + (k & 1);
          if (token < tokens) __stcg(inner + ((size_t)share * tokens + token) * padded + from + g + 8 * (k >> 1), c[n][k]);
        }
      __threadfence();
      __syncwarp();
      if (lane == 0) atomicAdd(flags, 1);
    }
#pragma unroll 1
    for (int poll = 0; poll < POLLS && done < units; ++poll) {
      if (lane == 0) asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(done) : "l"(flags) : "memory");
      done = __shfl_sync(0xffffffffu, done, 0);
    }
    if (done >= units) break;
    unit = take_unit(flags, lane);
  }
  __syncwarp();
}

// The inner sums of every MORE-th 16 ranks: their shares, added in order, as two bfloat16 numbers each, to shared memory:
// lane 4 g + t has four of token g. For `which` of MORE warps.
template <int TOKEN_TILES>
__device__ __forceinline__ void add_shares(
    uint4* to, const float* inner, float* inner_sums, int tokens, int rank, int padded, int shares, int which, int lane) {
  int g = lane >> 2, t = lane & 3;
  for (int from = 16 * which; from < padded; from += 16 * MORE) {
    int at = from + 4 * t;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
      float f[4] = {};
      // The lanes of tokens that are not there take shares of the one that is.
      int token = tokens == 1 ? 0 : min(n * 8 + g, tokens - 1), first = tokens == 1 ? g : 0, step = tokens == 1 ? 8 : 1;
#pragma unroll 8
      for (int share = first; share < shares; share += step) {
        float4 v = __ldcg(reinterpret_cast<const float4*>(inner + ((size_t)share * tokens + token) * padded + at));
        f[0] += v.x, f[1] += v.y, f[2] += v.z, f[3] += v.w;
      }
      if (tokens == 1) {
#pragma unroll
        for (int other = 4; other < 32; other *= 2)
#pragma unroll
          for (int k = 0; k < 4; ++k) f[k] += __shfl_xor_sync(0xffffffffu, f[k], other);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (at + k >= rank) f[k] = 0.f;
      if (inner_sums && n * 8 + g < tokens)
        for (int k = 0; k < 4; ++k)
          if (at + k < rank) inner_sums[(size_t)(n * 8 + g) * rank + at + k] = f[k];
      u32 high[2], low[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        high[h] = bf16_pair(f[2 * h], f[2 * h + 1]);
        float rest = f[2 * h] - low_of(high[h]), more = f[2 * h + 1] - high_of(high[h]);
        low[h] = bf16_pair(rest == rest ? rest : 0.f, more == more ? more : 0.f);  // inf less inf
      }
      to[(from / 16 * TOKEN_TILES + n) * 32 + lane] = make_uint4(high[0], high[1], low[0], low[1]);
    }
  }
}

// (x L2^T) L1 of every MORE-th of `count` tiles from `tile` on, to where the sums of a warp lie; for a warp.
template <int TOKEN_TILES, int R>
__device__ __forceinline__ void outer_products(
    float (&acc)[R][TOKEN_TILES][4], int tile, int count, int rows, const u16* left, const uint4* inner, int rank,
    int padded, int lane) {
  int g = lane >> 2, t = lane & 3;
#pragma unroll 2
  for (int from = 0; from < padded; from += 16) {
    int at = from + 4 * t;
    u32 factor[R][4];
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        int row = (tile + r * MORE) * 16 + 2 * g;
        factor[r][k] = 0;
        if (r * MORE < count && at + k < rank && row < rows)
          factor[r][k] = __ldg(reinterpret_cast<const u32*>(left + (size_t)(at + k) * rows + row));
      }
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
      uint4 b = inner[(from / 16 * TOKEN_TILES + n) * 32 + lane];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        u32 a0 = __byte_perm(factor[r][0], factor[r][1], 0x5410), a1 = __byte_perm(factor[r][0], factor[r][1], 0x7632);
        u32 a2 = __byte_perm(factor[r][2], factor[r][3], 0x5410), a3 = __byte_perm(factor[r][2], factor[r][3], 0x7632);
        add_product(acc[r][n], a0, a1, a2, a3, b.x, b.y);
        add_product(acc[r][n], a0, a1, a2, a3, b.z, b.w);
      }
    }
  }
}

// The sums of all warps, from shared memory: `count` tiles from `base` on are written. A warp has those of every STEP-th
// tile from `own` on, in place `at` of PLACES.
template <int TOKEN_TILES, int R, int STEP, int WARPS, int PLACES, int THREADS, bool EVEN>
__device__ __forceinline__ void add_up(
    const float (&acc)[(R + STEP - 1) / STEP][TOKEN_TILES][4], float* sums_at, u16* y, int rows, int base, int count,
    bool again, int tokens, int own, int at, int lane) {
  constexpr int T = TOKEN_TILES * 8, FIT = SUMS / (PLACES * 64 * T), ROUND = R < FIT ? R : FIT, WIDTH = 16 * ROUND;
  int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int from = 0; from < R; from += ROUND) {
    if (from < count) {
      if (from || again) barrier();
#pragma unroll
      for (int k = 0; k < (R + STEP - 1) / STEP; ++k) {
        int r = k * STEP + own;
        if (r >= from && r < from + ROUND) {
#pragma unroll
          for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              int token = n * 8 + 2 * t + (j & 1);
              if (token < tokens) sums_at[(at * T + token) * WIDTH + (r - from) * 16 + 2 * g + (j >> 1)] = acc[k][n][j];
            }
        }
      }
      barrier();
      for (int i = threadIdx.x; i < WIDTH * tokens; i += THREADS) {
        int row = (base + from) * 16 + i % WIDTH;
        if (row < (base + count) * 16 && (EVEN || row < rows)) {
          float sum = 0;
#pragma unroll
          for (int w = 0; w < PLACES; ++w) sum += sums_at[w * T * WIDTH + i];
          y[(size_t)(i / WIDTH) * rows + row] = (u16)bf16_pair(sum, 0.f);
        }
      }
    }
  }
}

template <int BITS, int SCALE_BITS, int TOKEN_TILES, int R, int WARPS, int PER_BLOCK, bool EVEN, bool LOW_RANK>
__global__ void __launch_bounds__((WARPS + (LOW_RANK ? MORE : 0)) * 32, 1) streamed(
    const Matrix m, const u16* __restrict__ x, u16* __restrict__ y, int tokens, int each, const u16* __restrict__ left,
    const u16* __restrict__ right, float* inner, float* inner_sums, int rank, int shares,
    int* flags) {
  extern __shared__ __align__(1024) u8 shared[];
  constexpr int T = TOKEN_TILES * 8, PLACES = WARPS + LOW_RANK, THREADS = (WARPS + (LOW_RANK ? MORE : 0)) * 32;
  float* sums_at = reinterpret_cast<float*>(shared);
  int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;

  // The last blocks have the tiles that are left over.
  int plain = gridDim.x - (m.tiles - each * gridDim.x), over = (int)blockIdx.x - plain;
  int first = blockIdx.x * each + max(0, over), last = first + each + (over >= 0), per = last - first;
  if (per > R) {
    int passes = (per + R - 1) / R;
    per = (per + passes - 1) / passes;
  }
  const u16* inputs[TOKEN_TILES];  // columns of a fragment's tokens that are not there are never stored
#pragma unroll
  for (int n = 0; n < TOKEN_TILES; ++n) inputs[n] = x + (size_t)min(n * 8 + g, tokens - 1) * m.columns + 8 * t;

  if (LOW_RANK && warp >= WARPS) {
    if (R > 2) registers<FEWER>();
    int padded = (rank + 15) & ~15, which = warp - WARPS;
#pragma unroll 1
    for (int k = which * 32 + lane; k < rank * (last - first); k += MORE * 32) {
      int row = (first + k / rank) * 16;
      if (row < m.rows) prefetch(left + (size_t)(k % rank) * m.rows + row);
    }
    size_t bytes = (size_t)rank * m.columns * 2;
#pragma unroll 1
    for (size_t k = (((size_t)blockIdx.x * MORE + which) * 32 + lane) * 128; k < bytes; k += (size_t)gridDim.x * MORE * 4096)
      prefetch(reinterpret_cast<const u8*>(right) + k);
    int unit = take_unit(flags, lane);
    after_the_kernel_before();
    barrier();
    inner_products<TOKEN_TILES, EVEN>(
        inputs, m.columns, tokens, right, inner, rank, padded, shares, unit, flags, lane);
    uint4* inner_at = reinterpret_cast<uint4*>(shared + SUMS);
    add_shares<TOKEN_TILES>(
        inner_at, inner, blockIdx.x == 0 ? inner_sums : nullptr, tokens, rank, padded, shares, which, lane);
    asm volatile("bar.sync 1, %0;" ::"n"(MORE * 32) : "memory");
    for (int base = first; base < last; base += per) {
      int count = min(per, last - base);
      float acc[(R + MORE - 1) / MORE][TOKEN_TILES][4] = {};
      outer_products(acc, base + which, count - which, m.rows, left, inner_at, rank, padded, lane);
      add_up<TOKEN_TILES, R, MORE, WARPS, PLACES, THREADS, EVEN>(
          acc, sums_at, y, m.rows, base, count, base != first, tokens, which, WARPS, lane);
    }
    barrier();
    if (warp == WARPS && lane == 0 && atomicAdd(flags + 1, 1) == (int)gridDim.x - 1) {
      flags[0] = 0;
      flags[1] = 0;
      flags[2] = 0;
      __threadfence();
    }
  } else {
    if (LOW_RANK && R > 2) registers<FURTHER>();
    using I = Item<BITS, SCALE_BITS, PER_BLOCK>;
    constexpr int FIT = RING / I::BYTES, SLOTS = FIT < MOST_SLOTS ? FIT : MOST_SLOTS;
    int stages = (m.chunks + U - 1) / U;
    u32 start = (u32)__cvta_generic_to_shared(shared), table = table_address(shared), entry = table | (lane * 4);
    u8* table_at = shared + (table - start);
    u32 ring = table + 65536 + warp * RING;
    const u8* ring_at = table_at + 65536 + warp * RING;
    Producer<BITS, SCALE_BITS, WARPS, PER_BLOCK, EVEN> p;
    p.base = warp < stages ? first : last, p.last = last, p.per = per, p.count = min(per, last - first);
    p.stage = warp, p.r = 0;
    p.place(m, lane);
    constexpr int LAST = BITS == 8 ? 255 : (1 << BITS) - 1;
    float mine = BITS == 8 ? 0.f : __ldg(m.table + (lane & LAST)), offset = __ldg(m.offset);
#pragma unroll 1
    for (int slot = 0; slot < SLOTS; ++slot) p.fill(m, ring + slot * I::BYTES, stages, warp, lane);
    fill_table_fast<BITS, WARPS>(table_at, mine, m.table, warp, lane);
    after_the_kernel_before();
    barrier();
    asm volatile("" : "+r"(entry)::"memory");  // no look-up before the table is there
    u32 slot = 0;  // its place in the ring
    for (int base = first; base < last; base += per) {
      int count = min(per, last - base);
      float acc[R][TOKEN_TILES][4] = {};
      for (int stage = warp; stage < stages; stage += WARPS) {
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
            asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 1) : "memory");
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
            if (slot == SLOTS * I::BYTES) slot = 0;
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
      add_up<TOKEN_TILES, R, 1, WARPS, PLACES, THREADS, EVEN>(
          acc, sums_at, y, m.rows, base, count, base != first, tokens, 0, warp, lane);
    }
    if (LOW_RANK) barrier();
  }
}
