// A launch for up to 64 things. Each has some of the blocks, from `begin` on.
template<class A> struct Many { A at[64]; long long count; };
template<class A> __device__ __forceinline__ const A& whose(const Many<A>& m, int block) {
    int i = 0;
    for (int step = 32; step; step /= 2) if (i + step < m.count && m.at[i + step].begin <= block) i += step;
    return m.at[i];
}
